"""A server of ours against those who connect and say nothing, and against signals while it computes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from launching import ROOT
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lingshu_rl.processes import doors
from lingshu_rl.processes.pool import Pool


@pytest.fixture
def server(monkeypatch):
    """A small one with small limits, and how many connections it holds."""
    for name, value in {"IDLE_S": 1.0, "PER_PEER": 5, "IDLE": 8, "LOOK_S": 0.1}.items():
        monkeypatch.setattr(doors, name, value)

    async def work(request):
        return PlainTextResponse(f"{len(await request.body())} bytes")

    app = Starlette(routes=[Route("/work", work, methods=["GET", "POST"])])
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http=doors.guarded_protocol()))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield port, running.server_state.connections
    running.should_exit = True
    thread.join()


def connections(port, count, say=b"", host="127.0.0.1"):
    made = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", port), source_address=(host, 0))
        with contextlib.suppress(OSError):
            one.sendall(say)
        made.append(one)
    return made


def soon(true):
    """Within the time in which the answered requests' connections go, and before the idle ones' time is over."""
    deadline = time.monotonic() + 0.5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def answer_of(one):
    """Headers and the short text of these routes."""
    got = b""
    while not got.endswith(b"bytes"):
        got += one.recv(1000)
    return got


def closed(one):
    one.settimeout(3)
    try:
        return one.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "say", [b"", b"POST /work HTTP/1.1\r\nhost: x\r\n", b"GET /work HTTP/1.1\r\nx: " + b"a" * 5000]
)
def test_those_who_say_nothing_or_half_of_it_keep_nobody_out(say, server):
    port, held = server
    idle = connections(port, 40, say)
    for _ in range(5):
        assert httpx.get(f"http://127.0.0.1:{port}/work", timeout=2).text == "0 bytes"
    assert soon(lambda: sum(not one.busy for one in list(held)) <= doors.PER_PEER)
    assert all(map(closed, idle))


def test_one_that_sends_its_header_a_byte_at_a_time_is_shown_out(server):
    port, _ = server
    (one,) = connections(port, 1)
    began = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in b"GET /work HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200:
            one.sendall(bytes([byte]))
            time.sleep(0.05)
    assert closed(one) and time.monotonic() - began < 3


def test_many_peers_together_hold_no_more_than_all_may(server):
    port, held = server
    idle = [one for n in range(2, 8) for one in connections(port, 4, host=f"127.0.0.{n}")]
    assert httpx.get(f"http://127.0.0.1:{port}/work", timeout=2).status_code == 200
    assert soon(lambda: sum(not one.busy for one in list(held)) <= doors.IDLE) and all(map(closed, idle))


def test_a_request_that_takes_long_is_never_idle(server):
    port, _ = server
    (one,) = connections(port, 1, b"POST /work HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n")
    for _ in range(30):
        time.sleep(0.1)
        one.sendall(b"x")
    assert answer_of(one).endswith(b"30 bytes")
    one.sendall(b"GET /work HTTP/1.1\r\nhost: x\r\n\r\n")  # and the connection is used again
    assert answer_of(one).endswith(b"0 bytes") and closed(one)


BUSY = """
import asyncio, sys
from lingshu_rl.processes.doors import serve
from lingshu_rl.processes.threads import in_thread

async def hold(how):
    print("computing", flush=True)
    await in_thread(how)

def numbers():
    import torch
    a = torch.rand(900, 900)
    while True: a = (a @ a).clamp(0, 1)

def interpreter():  # C code that keeps the interpreter to itself
    import re
    re.match(r"(a?){40}a{40}", "a" * 40)

class App:
    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive(); await send({"type": "lifespan.startup.complete"})
            asyncio.create_task(hold({"numbers": numbers, "interpreter": interpreter}[sys.argv[1]]))
            await receive()
serve(App(), host="127.0.0.1", port=0, most=9)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("work", ["numbers", "interpreter"])
def test_a_signal_ends_it_whatever_it_computes(work, number):
    process = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-c", BUSY, work],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "computing\n"
    time.sleep(1.0)
    process.send_signal(number)
    assert process.wait(3) == -number


def test_a_call_is_not_lost_with_the_connection_of_the_one_before_it():
    """As uvicorn does after a fault in a handler: it answers 500 and closes, and what came meanwhile is never read."""

    async def answer(reader, writer):
        for reply in (b"HTTP/1.1 500 Fault\r\nContent-Length: 0\r\n\r\n", b""):
            while (await reader.readline()).strip():
                pass
            writer.write(reply)
        writer.close()

    async def story():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            pool = Pool("rollout", [url], token="", timeout_s=5, retries=0, error=RuntimeError)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="answered 500"):
                    await pool.post_to(pool.servers, "/start_weight_update")
            await pool.close()

    asyncio.run(story())

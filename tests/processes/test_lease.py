"""A server belongs to one run at a time, for as long as that run lives."""

import asyncio
import os
import signal
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
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from lingshu_rl.processes import lease as leases
from lingshu_rl.processes.lease import Lease, OneRun, Taken
from lingshu_rl.processes.pool import Pool
from lingshu_rl.processes.token import RequireToken

HOLD = "import sys, time\nfrom lingshu_rl.processes.lease import Lease\nwith Lease([sys.argv[1]], run='r1', holder='the first run', token='').held() as open_to_all:\n    print('held', open_to_all, flush=True)\n    time.sleep(600)\n"


def app():
    async def work(request):
        return PlainTextResponse("done")

    return OneRun(Starlette(routes=[Route("/work", work, methods=["GET", "POST"])]))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 2.0)  # of the server, which runs here
    running = uvicorn.Server(uvicorn.Config(app(), port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture
def holder(server):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("import Lease\n", "import Lease\nimport lingshu_rl.processes.lease as l\nl.BEAT_S = 0.3\n"), server],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held []\n"
    yield process
    process.kill()
    process.wait()


def ask(server, run):
    async def post():
        pool = Pool("rollout", [server], token="", timeout_s=5, retries=0, error=RuntimeError, run=run)
        try:
            return await pool.post("/work", bytes, bytes.decode, prompt_id="q")
        finally:
            await pool.close()

    return asyncio.run(post())[0]


def test_another_run_is_refused_by_the_holders_name_and_may_only_look(server, holder):
    with pytest.raises(Taken, match=rf"{server} is in use by the first run: wait for it"), Lease([server], run="r2", holder="the second", token="").held():  # fmt: skip
        raise AssertionError
    for stranger in ("r2", ""):
        with pytest.raises(Taken, match=r"the rollout server http.* is in use by the first run"):
            ask(server, stranger)
        assert httpx.get(f"{server}/work", headers={leases.RUN: stranger}).text == "done"
        assert httpx.request("DELETE", server + leases.ROUTE, headers={leases.RUN: stranger}).status_code == leases.TAKEN  # fmt: skip
    assert ask(server, "r1") == "done"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_died_or_ended_holds_nothing_and_is_waited_for(server, holder, how):
    holder.send_signal(how)
    with Lease([server], run="r2", holder="the second", token="").held() as open_to_all:
        assert open_to_all == [] and ask(server, "r2") == "done"
        with pytest.raises(Taken, match="in use by the second"):
            ask(server, "r1")
    assert ask(server, "") == "done"


def test_the_same_run_started_again_goes_on_at_once(server, holder):
    holder.kill()
    began = time.monotonic()
    with Lease([server], run="r1", holder="the first run", token="").held():
        assert time.monotonic() - began < 1 and ask(server, "r1") == "done"


def test_a_run_that_was_away_too_long_finds_out_at_its_next_request(server, monkeypatch):
    """Suspended, say: the hold has ended, and another run has it."""
    monkeypatch.setattr(leases, "BEAT_S", 600)
    with Lease([server], run="r1", holder="sleeper", token="").held():
        assert ask(server, "r1") == "done"
        time.sleep(2.1)
        with (
            Lease([server], run="r2", holder="the second", token="").held(),
            pytest.raises(Taken, match="in use by the second"),
        ):
            ask(server, "r1")


def test_a_server_that_keeps_no_leases_is_named():
    plain = uvicorn.Server(uvicorn.Config(Starlette(), port=0, log_level="error"))
    thread = threading.Thread(target=plain.run, daemon=True)
    thread.start()
    while not plain.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{plain.servers[0].sockets[0].getsockname()[1]}"
    with Lease([url], run="r1", holder="x", token="").held() as open_to_all:
        assert open_to_all == [url]
    plain.should_exit = True
    thread.join()


@pytest.mark.parametrize("body", [b"", b"junk", b"[]", b'{"who": "x"}', b'"x"'])
def test_a_hold_must_say_whose_it_is(server, body):
    answer = httpx.put(server + leases.ROUTE, content=body, headers={leases.RUN: "r1"})
    assert answer.status_code == 400 and ask(server, "r2") == "done"
    assert httpx.put(server + leases.ROUTE, json={"holder": "x"}).status_code == 400  # of no run


def test_the_token_guards_leases_and_websockets_too():
    async def hear(websocket):
        await websocket.accept()
        await websocket.send_text("secret")
        await websocket.close()

    guarded = RequireToken(
        Starlette(routes=[WebSocketRoute("/v1/realtime", hear), WebSocketRoute("/health", hear)]), "t"
    )
    http = TestClient(guarded)
    assert http.put(leases.ROUTE, json={"holder": "x"}, headers={leases.RUN: "r"}).status_code == 401
    for path in ("/v1/realtime", "/health"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(WebSocketDisconnect), http.websocket_connect(path, headers=headers):
                raise AssertionError
        with http.websocket_connect(path, headers={"Authorization": "Bearer t"}) as open_one:
            assert open_one.receive_text() == "secret"

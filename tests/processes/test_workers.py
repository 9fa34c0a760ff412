import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from lingshu_rl.processes.workers import Supervisor, Worker, WorkerError, free_port, stop_all

SERVER = """
import http.server, sys, signal, subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


def worker(tmp_path, code=SERVER, *extra, timeout=1.0):
    port = free_port()
    command = [sys.executable, "-c", code, str(port), *extra]
    return Worker(
        "test server", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "w.log", env={}, stop_timeout_s=timeout
    )


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def child_of(w):
    return int(w.log.read_text().split()[1])


def gone_soon(pid):
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("extra", [(), ("stubborn",)])
def test_stop_ends_the_process_and_its_children(tmp_path, extra):
    w = worker(tmp_path, SERVER, *extra)
    w.wait_healthy(20)
    child = child_of(w)
    stop_all([w])
    assert not alive(w.process.pid) and gone_soon(child)
    stop_all([w])


def test_a_worker_that_ends_is_an_error_with_its_code_and_log(tmp_path):
    w = worker(tmp_path, "import sys; print('cannot find the weights'); sys.exit(3)")
    with pytest.raises(WorkerError, match=r"(?s)test server ended with exit code 3.*w\.log.*cannot find the weights"):
        w.wait_healthy(20)
    w.stop()


def test_a_killed_worker_names_the_signal(tmp_path):
    w = worker(tmp_path)
    w.wait_healthy(20)
    os.kill(w.process.pid, signal.SIGKILL)
    w.process.wait()
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        w.check_alive()
    child = child_of(w)
    w.stop()
    assert gone_soon(child)


def test_a_worker_that_is_never_ready_times_out(tmp_path):
    w = worker(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(WorkerError, match="not ready after 1 s"):
        w.wait_healthy(1)
    w.stop()


def test_workers_die_with_a_trainer_that_is_killed(tmp_path):
    trainer = f"""
import sys, time; sys.path.insert(0, {os.getcwd()!r})
from pathlib import Path
from lingshu_rl.processes.workers import Worker
w = Worker("w", [sys.executable, "-c", "import time; time.sleep(600)"], url="", log=Path({str(tmp_path)!r}) / "w.log", env={{}}, stop_timeout_s=1)
print(w.process.pid, flush=True); time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    assert gone_soon(pid)


def supervised(w, body, *, max_restarts=1):
    """Run `body(supervisor, events)` while the worker is watched; returns the events."""
    events = []

    async def run():
        supervisor = Supervisor([w], max_restarts=max_restarts, lost=lambda w: events.append("lost"),
                                revive=lambda w: events.append("back"), say=events.append)  # fmt: skip
        try:
            await body(supervisor, events)
        finally:
            await supervisor.close()
            stop_all([w])

    asyncio.run(run())
    return events


async def until(events, word, patience_s=20):
    deadline = time.monotonic() + patience_s
    while word not in events:
        assert time.monotonic() < deadline, events
        await asyncio.sleep(0.05)


def test_a_dead_worker_is_started_again_and_after_that_is_an_error(tmp_path):
    w = worker(tmp_path)
    w.wait_healthy(20)

    async def body(supervisor, events):
        first = child_of(w)
        os.kill(w.process.pid, signal.SIGKILL)
        assert gone_soon(w.process.pid) and await supervisor.examine(w.name)
        await until(events, "back")
        assert gone_soon(first) and w.healthy() and not await supervisor.examine(w.name)
        os.kill(w.process.pid, signal.SIGKILL)
        with pytest.raises(
            WorkerError, match=r"(?s)killed by SIGKILL.*w\.log.*started again 1 times \(run.max_restarts\)"
        ):
            await asyncio.wait_for(supervisor.failure, 20)

    events = supervised(w, body)
    assert [e for e in events if e in ("lost", "back")] == ["lost", "back", "lost"]
    assert any("test server was killed by SIGKILL" in e and "starting it again (1 of 1)" in e for e in events)


def test_a_worker_that_no_longer_answers_is_killed_and_started_again(tmp_path):
    w = worker(tmp_path)
    w.wait_healthy(20)

    async def body(supervisor, events):
        os.kill(w.process.pid, signal.SIGSTOP)
        assert await supervisor.examine(w.name, patience_s=0.1)
        await until(events, "back")

    assert any("has not answered" in e for e in supervised(w, body))


def test_a_worker_that_cannot_start_again_ends_the_run_with_its_log(tmp_path):
    w = worker(tmp_path)
    w.wait_healthy(20)

    async def body(supervisor, events):
        w.command = [sys.executable, "-c", "print('no device'); raise SystemExit(4)"]
        os.kill(w.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"(?s)ended with exit code 4.*no device.*started again 2 times"):
            await asyncio.wait_for(supervisor.failure, 20)

    supervised(w, body, max_restarts=2)


def test_a_fault_while_a_worker_is_replaced_ends_the_wait_of_the_run(tmp_path):
    """Whatever raises in the watching tasks is the failure; nobody awaits them, so it would be lost."""
    w = worker(tmp_path)
    w.wait_healthy(20)

    async def body():
        def lost(_):
            raise KeyError("no such server")

        supervisor = Supervisor([w], max_restarts=1, lost=lost, revive=lambda w: None, say=lambda text: None)
        try:
            os.kill(w.process.pid, signal.SIGKILL)
            with pytest.raises(KeyError, match="no such server"):
                await asyncio.wait_for(supervisor.failure, 20)
        finally:
            await supervisor.close()
            stop_all([w])

    asyncio.run(body())

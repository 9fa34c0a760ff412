"""Child processes of a run (vLLM servers, reference servers): started, watched, and never left behind.

Each runs in a process group of its own, so that a terminal's Ctrl-C reaches only the trainer, which then stops them in
order. If the trainer itself is killed, the kernel's parent-death signal stops them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from lingshu_rl.failures import RunStopped

PR_SET_PDEATHSIG = 1
HOST, PORT = "{host}", "{port}"  # stand in a command for what is known only where it starts


class WorkerError(RunStopped):
    """A child process failed; the message names it, its exit code, its log and the log's last lines."""


class Worker:
    """One server process that answers `GET /health` when it is ready. role: what it serves, see `fleet`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        log: Path,
        env: Mapping[str, str],
        role: str = "",
        start_timeout_s: float = 300.0,
        stop_timeout_s: float,
    ) -> None:
        self.name, self.role, self.url, self.log = name, role, url, log
        self.start_timeout_s, self.stop_timeout_s = start_timeout_s, stop_timeout_s
        self.command, self.env = list(command), dict(env)
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """Start the process; call it from the main thread: the parent-death signal follows the thread that forked."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_healthy(self, timeout_s: float | None = None) -> None:
        """Block until /health answers 200. Raises WorkerError when the process ends or the time (start_timeout_s) is
        over."""
        timeout_s = self.start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            if self.healthy():
                return
            time.sleep(0.2)
        raise WorkerError(f"{self.name} was not ready after {timeout_s:.0f} s; its log is {self.log}{self.tail()}")

    def healthy(self, timeout_s: float = 2.0) -> bool:
        past_any_proxy = httpx.HTTPTransport()
        with contextlib.suppress(httpx.HTTPError), httpx.Client(transport=past_any_proxy, timeout=timeout_s) as http:
            return http.get(f"{self.url}/health").status_code == 200
        return False

    def check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerError(f"{self.name} {how}; its log is {self.log}{self.tail()}")

    def ask_to_stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the whole process group: asked first, killed after `stop_timeout_s`. Safe to call twice."""
        for number, wait_s in ((signal.SIGTERM, self.stop_timeout_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=wait_s)
            if not group_exists(self.process.pid):
                return

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").rstrip() if self.log.exists() else ""
        return "\n  | " + "\n  | ".join(text.splitlines()[-lines:]) if text else " (empty)"


class Supervisor:
    """Starts a server that died again, at most `max_restarts` times each; then `failure` holds the WorkerError.

    lost: told at once, so that nothing more is sent there. revive: told when it answers again.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_restarts: int,
        lost: Callable[[Worker], None],
        revive: Callable[[Worker], None],
        say: Callable[[str], None],
    ) -> None:
        self.workers, self.max_restarts = workers, max_restarts
        self.lost, self.revive, self.say = lost, revive, say
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._restarting: dict[str, asyncio.Task[None]] = {}
        self._watch = self._task(self._poll())

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose exception is the failure: nobody awaits it."""

        def note(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) and not self.failure.done():
                self.failure.set_exception(error)

        task = asyncio.create_task(work)
        task.add_done_callback(note)
        return task

    async def _poll(self) -> None:
        while True:
            for worker in self.workers:
                self._look(worker)
            await asyncio.sleep(0.5)

    def _look(self, worker: Worker) -> bool:
        """True when the worker is down (and being started again)."""
        if worker.name in self._restarting:
            return True
        try:
            worker.check_alive()
        except WorkerError as death:
            self._restarting[worker.name] = self._task(self._restart(worker, death))
            return True
        return False

    async def examine(self, name: str, patience_s: float = 15.0) -> bool:
        """After a failed request: is the server down? One that neither ends nor answers for `patience_s` is killed."""
        worker = next((w for w in self.workers if w.name == name), None)
        if worker is None:
            return False
        deadline = time.monotonic() + patience_s
        while not self._look(worker):
            if await asyncio.to_thread(worker.healthy):
                return False
            if time.monotonic() > deadline:
                self.say(
                    f"{worker.name} has not answered for {patience_s:.0f} s and is killed; its log is {worker.log}"
                )
                await asyncio.to_thread(worker.kill)
                deadline = float("inf")
            await asyncio.sleep(0.2)
        return True

    async def restart(self, name: str) -> bool:
        """End a server that answers and yet is of no more use, so that it is started again. False for one of others."""
        worker = next((w for w in self.workers if w.name == name), None)
        if worker is None:
            return False
        if not self._look(worker):
            self.say(f"{worker.name} takes no weights any more and is killed; its log is {worker.log}")
            await asyncio.to_thread(worker.kill)
            self._look(worker)
        await asyncio.sleep(0)  # in which `lost` is told
        return True

    async def _restart(self, worker: Worker, death: WorkerError) -> None:
        """Until it answers again. When that fails it stays in `_restarting`: nobody tries once more."""
        self.lost(worker)
        while True:
            if worker.restarts >= self.max_restarts:
                raise WorkerError(
                    f"{death}\n{worker.name} was started again {worker.restarts} times (run.max_restarts)"
                )
            worker.restarts += 1
            self.say(f"{str(death).splitlines()[0]}; starting it again ({worker.restarts} of {self.max_restarts})")
            await asyncio.to_thread(worker.stop)
            worker.start()
            try:
                await asyncio.to_thread(worker.wait_healthy)
                break
            except WorkerError as again:
                death = again
        del self._restarting[worker.name]
        self.say(f"{worker.name} is back")
        self.revive(worker)

    async def close(self) -> None:
        """Start nothing any more."""
        tasks = [self._watch, *self._restarting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.failure.done():
            self.failure.exception()


def stop_all(workers: Sequence[Worker]) -> None:
    """Stop every worker; the waits overlap because all are asked before any is waited for."""
    for worker in workers:
        worker.ask_to_stop()
    for worker in workers:
        worker.stop()


def die_with_launcher() -> None:
    """Stop when `accelerate launch` is stopped, which does not pass a SIGTERM on to a single process."""
    if _libc is not None and "ACCELERATE_MIXED_PRECISION" in os.environ:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now, below the range from which systems draw ports for outgoing connections: a server binds
    it seconds later, and until then nobody else picks it by chance."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port


def address_towards(host: str, port: int = 9, family: int = socket.AF_UNSPEC) -> str:
    """This host's address from which connections to `host` start. Connecting a datagram socket sends nothing."""
    family, kind, *_, far = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(far)
        return str(probe.getsockname()[0])


def python() -> str:
    return sys.executable


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

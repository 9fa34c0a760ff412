"""Child processes of a run (vLLM servers, reference servers): started, watched, and never left behind.

Each runs in a process group of its own, so that a terminal's Ctrl-C reaches only the trainer, which then stops them in
order. If the trainer itself is killed, the kernel's parent-death signal stops them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """A child process failed; the message names it, its exit code, its log and the log's last lines."""


class Worker:
    """One server process that answers `GET /health` when it is ready."""

    def __init__(
        self, name: str, command: Sequence[str], *, url: str, log: Path, env: Mapping[str, str], stop_timeout_s: float
    ) -> None:
        self.name, self.url, self.log, self.stop_timeout_s = name, url, log, stop_timeout_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                list(command),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait_healthy(self, timeout_s: float) -> None:
        """Block until /health answers 200. Raises WorkerError when the process ends or the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.2)
        raise WorkerError(f"{self.name} was not ready after {timeout_s:.0f} s; its log is {self.log}{self._tail()}")

    def check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerError(f"{self.name} {how}; its log is {self.log}{self._tail()}")

    def stop(self) -> None:
        """End the whole process group: asked first, killed after `stop_timeout_s`. Safe to call twice."""
        for number, wait_s in ((signal.SIGTERM, self.stop_timeout_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=wait_s)
            if not _group_exists(self.process.pid):
                return

    def _tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").rstrip() if self.log.exists() else ""
        return "\n  | " + "\n  | ".join(text.splitlines()[-lines:]) if text else " (empty)"


def stop_all(workers: Sequence[Worker]) -> None:
    """Stop every worker; the waits overlap because all are asked before any is waited for."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGTERM)
    for worker in workers:
        worker.stop()


def die_with_launcher() -> None:
    """Stop when `accelerate launch` is stopped, which does not pass a SIGTERM on to a single process."""
    if _libc is not None and "ACCELERATE_MIXED_PRECISION" in os.environ:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port that is free now, below the range from which systems draw ports for outgoing connections: a server binds it
    seconds later, and until then nobody else picks it by chance."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def python() -> str:
    return sys.executable


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

"""A process of its own for what damaged files can end: C++ libraries that abort instead of raising.

It is started with the first request, stays, and is replaced when it ends. It reads requests, a line of JSON each, and
answers with a length (8 bytes, little-endian) and so many bytes: "P" and what was made, or "E" and why there is none.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

LIMIT_S = 120.0  # for one answer; then the process is stuck
TOLD = 500  # characters of a library's own words


class Ended(Exception):
    """The process that was asked ended, or was stuck."""


class NoAnswer(Exception):
    """There is no answer; the text says why."""


class Apart:
    """One process, asked by one thread at a time. module: its program, which calls `serve`."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, *request: Any) -> bytes:
        """Raises Ended and NoAnswer."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                command = [sys.executable, "-m", self.module]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            limit = threading.Timer(LIMIT_S, self.process.kill)
            limit.start()
            try:
                told = self._answer(self.process, json.dumps(request))
            finally:
                limit.cancel()
        if told[:1] == b"E":
            raise NoAnswer(told[1:].decode())
        return told[1:]

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], request: str) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{request}\n".encode())
            process.stdin.flush()
            head = process.stdout.read(8)
            told = process.stdout.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
        except BrokenPipeError:
            told = b""
        if told:
            return told
        process.kill()
        process.wait()
        raise Ended


def serve(make: Callable[..., bytes]) -> None:
    """The process's own loop: an answer to every request, until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print where answers would be
    for request in sys.stdin.buffer:
        try:
            told = b"P" + make(*json.loads(request))
        except Exception as error:  # libraries raise their own kinds
            told = b"E" + in_a_line(error).encode("utf-8", "backslashreplace")
        answers.write(struct.pack("<Q", len(told)) + told)
        answers.flush()


def in_a_line(error: Exception) -> str:
    """The kind of a library's error and what it says, up to TOLD characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:TOLD]

"""Compressed DICOM frames, decoded in a process of their own: on some damage GDCM ends the one that it is in.

The process is started with the first such frame, stays, and is replaced when it ends. It reads requests, a line of JSON
each, and answers with a length (8 bytes, little-endian) and so many bytes: "P" and the frame as `numpy.save` writes it,
or "E" and why there is none.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from lingshu_rl.imaging.pixels import ScanError

LIMIT_S = 120.0  # for one frame; then the decoder is stuck


class Decoder:
    """One process, asked by one thread at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def frame(self, file: Path, number: int) -> np.ndarray:
        """Stored values of one frame, colours as RGB. Raises ScanError, also where the decoder ended or is stuck."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                command = [sys.executable, "-m", "lingshu_rl.imaging.decoding_child"]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            limit = threading.Timer(LIMIT_S, self.process.kill)
            limit.start()
            try:
                told = self._answer(self.process, json.dumps([str(file.absolute()), number]))
            finally:
                limit.cancel()
        if told is None:
            raise ScanError(f"{file}: frame {number} ended its decoder: the file is damaged")
        if told[:1] == b"E":
            raise ScanError(f"{file}: frame {number} cannot be decoded: {told[1:].decode()}")
        return np.load(io.BytesIO(told[1:]), allow_pickle=False)

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], request: str) -> bytes | None:
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
        return None


DECODER = Decoder()

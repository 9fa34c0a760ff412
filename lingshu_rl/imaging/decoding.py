"""Compressed DICOM frames, decoded in a process of their own: on some damage GDCM ends the one that it is in.

The process is started with the first such frame, stays, and is replaced when it ends. It reads requests, a line of JSON
each, and answers with a length (8 bytes, little-endian) and so many bytes: "P" and the frame as `numpy.save` writes it,
or "E" and why there is none.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.imaging.scans import ScanError

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
                command = [sys.executable, "-m", "lingshu_rl.imaging.decoding"]
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


@lru_cache(maxsize=1)
def _header(file: str, stamp: int) -> Any:
    from lingshu_rl.imaging.dicom import read_header

    return read_header(Path(file))


def _decoded(file: str, number: int) -> bytes:
    from pydicom.pixels import pixel_array

    out = io.BytesIO()
    try:
        pixels = pixel_array(_header(file, os.stat(file).st_mtime_ns), index=number)
        np.save(out, pixels, allow_pickle=False)
    except Exception as error:  # decoders raise their own kinds
        return b"E" + " ".join(f"{type(error).__name__}: {error}".split())[:500].encode("utf-8", "backslashreplace")
    return b"P" + out.getvalue()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # decoders print where answers would be
    for request in sys.stdin.buffer:
        told = _decoded(*json.loads(request))
        answers.write(struct.pack("<Q", len(told)) + told)
        answers.flush()


if __name__ == "__main__":
    main()

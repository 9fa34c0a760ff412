"""The process that `decoding.Decoder` asks for frames."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.pixels import pixel_array

from lingshu_rl.imaging.dicom import read_header


@lru_cache(maxsize=1)
def _header(file: str, stamp: int) -> Any:
    return read_header(Path(file))


def _decoded(file: str, number: int) -> bytes:
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

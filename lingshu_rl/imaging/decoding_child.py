"""The process that `decoding.Decoder` asks for frames."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.pixels import pixel_array

from lingshu_rl.apart import serve
from lingshu_rl.imaging.dicom import read_header


@lru_cache(maxsize=1)
def _header(file: str, stamp: int) -> Any:
    return read_header(Path(file))


def _decoded(file: str, number: int) -> bytes:
    out = io.BytesIO()
    np.save(out, pixel_array(_header(file, os.stat(file).st_mtime_ns), index=number), allow_pickle=False)
    return out.getvalue()


if __name__ == "__main__":
    serve(_decoded)

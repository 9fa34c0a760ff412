"""What makes two pictures the same one: a perceptual hash finds candidates, an alignment of the pixels decides.

A 64-bit hash alone cannot tell a re-saved chest X-ray from the next film of the same patient. Here the hash only proposes:
a pair counts as near duplicate when, after a small affine alignment, the fine structure of both correlates.
Mirror images are different pictures (left and right matter), so they are never matched.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

GREY = 256  # pixels of the longer side of the grey picture that all is computed from
HASH_SIDE = 64  # pixels a side before the cosine transform
THUMB = 64  # pixels a side of the stored thumbnail
CENTRE = (
    0.86  # share of width and height that is hashed: what stays in view when a picture is turned by up to 6 degrees
)
LONG_BITS = (
    52  # of 256 in which candidates may differ; unrelated chest films begin at about 52, altered copies end at about 40
)
SCORE = 0.97  # correlation of fine structure from which on two aligned pictures are one
RIM = 5  # thumbnail pixels at each side that the comparison leaves out
STOP = (3, 40, 1e-4)  # the alignment ends after 40 rounds, or when the correlation gains less than this
FLAT = 2.0  # grey levels; below this standard deviation a picture has no structure to compare
# A query is hashed turned (degrees) and zoomed as well, so that its twin is near whichever way one of them was changed.
VARIANTS = (
    *((turn, 1.0) for turn in (0, -2, 2, -4, 4, -6, 6)),
    *((0, zoom) for zoom in (0.95, 1.055)),
    *((turn, zoom) for turn in (-3, 3) for zoom in (0.95, 1.055)),
    *((turn, zoom) for turn in (-5, 5) for zoom in (0.92, 1.085)),
)


class ImageError(ValueError):
    """Why a picture cannot be read."""


@dataclass(frozen=True)
class Features:
    """sha: of the file's bytes. pixels: of size, mode and decoded pixels. std: grey levels. sharpness: variance of the
    Laplacian of the 256-pixel grey picture. short, long: 64- and 256-bit hashes, long as 32 bytes. thumb: 64 x 64 grey.
    queries: the (short, long) hash of every entry of VARIANTS.
    """

    sha: str
    pixels: str
    width: int
    height: int
    std: float
    sharpness: float
    short: int
    long: bytes
    thumb: bytes
    queries: tuple[tuple[int, bytes], ...]

    @property
    def flat(self) -> bool:
        return self.std < FLAT


def features(image: str | bytes) -> Features:
    """Features of an image file or encoded bytes. Raises ImageError."""
    import cv2
    from PIL import Image

    try:
        data = Path(image).read_bytes() if isinstance(image, str) else image
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            picture: Image.Image = opened
            if picture.mode.startswith(("I", "F")):
                raise ImageError(
                    "over 8 bits a channel: choose a window (`scan: {window: [centre, width]}` of its source)"
                )
            if "A" in picture.getbands() or picture.mode == "P":
                picture = picture.convert("RGBA").convert("RGB")
            size = picture.size
            digest = hashlib.sha256(f"{picture.mode}{size}".encode() + picture.tobytes()).hexdigest()
            if max(size) > 2 * GREY:  # a box filter first: the cosine transform must not see aliasing
                picture = picture.reduce(max(size) // GREY)
            grey = picture.convert("L")
            grey.thumbnail((GREY, GREY), Image.Resampling.LANCZOS)
            pixels = np.asarray(grey)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(str(error)) from error
    std = float(pixels.std())
    sharpness = float(cv2.Laplacian(pixels, cv2.CV_32F).var())
    queries = tuple(_hashes(_turned(pixels, turn, zoom)) for turn, zoom in VARIANTS)
    thumb = cv2.resize(pixels, (THUMB, THUMB), interpolation=cv2.INTER_AREA)
    sha = hashlib.sha256(data).hexdigest()
    return Features(sha, digest, *size, std, sharpness, *queries[0], thumb.tobytes(), queries)


def distance(a: int, b: int) -> int:
    """Differing bits of two short hashes."""
    return (a ^ b).bit_count()


def likeness(a: bytes, b: bytes, variant: int) -> float:
    """Correlation in [-1, 1] of two thumbnails' fine structure after the best affine alignment; -1 where none is found.

    variant: index into VARIANTS from which the alignment starts. The alignment is the enhanced correlation coefficient
    (Evangelidis and Psarakis 2008, as in OpenCV); the score leaves out a rim and everything coarser than 4 pixels, in which
    all chest films agree.
    """
    import cv2

    first, second = (np.frombuffer(t, np.uint8).reshape(THUMB, THUMB).astype(np.float32) for t in (a, b))
    # Only the middle of the second is sought in the first: a picture cut a little smaller still covers it.
    centre, side = (THUMB - 1) / 2, THUMB - 2 * RIM
    turn, zoom = VARIANTS[variant]
    warp: Any = cv2.invertAffineTransform(cv2.getRotationMatrix2D((centre, centre), turn, zoom))
    warp[:, 2] += warp[:, :2] @ (RIM, RIM)
    middle = np.ascontiguousarray(second[RIM:-RIM, RIM:-RIM])
    try:
        everywhere: Any = None
        _, warp = cv2.findTransformECC(middle, first, warp.astype(np.float32), cv2.MOTION_AFFINE, STOP, everywhere, 5)
    except cv2.error:  # does not converge: the pictures have nothing in common
        return -1.0
    if not 0.85 < math.sqrt(abs(float(np.linalg.det(warp[:, :2])))) < 1.18:
        return -1.0
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(first, warp, (side, side), flags=flags)
    seen: Any = cv2.warpAffine(np.ones((THUMB, THUMB), np.uint8), warp, (side, side), flags=cv2.WARP_INVERSE_MAP)
    seen = cv2.erode(seen, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    if seen.mean() < 0.7:
        return -1.0
    x, y = _fine(moved)[seen], _fine(middle)[seen]
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else -1.0


def _fine(x: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(x, (0, 0), 0.8) - cv2.GaussianBlur(x, (0, 0), 4)


def _turned(pixels: np.ndarray, turn: float, zoom: float) -> np.ndarray:
    """The centre of the picture after turning it by `turn` degrees and enlarging it by `zoom`."""
    import cv2

    height, width = pixels.shape
    if turn or zoom != 1:
        turned = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), turn, zoom)
        pixels = cv2.warpAffine(pixels, turned, (width, height), flags=cv2.INTER_LINEAR)
    top, left = round(height * (1 - CENTRE) / 2), round(width * (1 - CENTRE) / 2)
    return pixels[top : height - top, left : width - left]


def _hashes(pixels: np.ndarray) -> tuple[int, bytes]:
    """Signs of the low cosine frequencies against their median: the 8 x 8 lowest as 64 bits, the 16 x 16 as 256."""
    import cv2

    small = cv2.resize(pixels, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    basis = _cosines()
    low = basis @ small @ basis.T
    low[0, 0] = np.median(low)  # the mean brightness says nothing about the picture
    short, long = low[:8, :8].ravel(), low.ravel()
    bits = np.packbits(short > np.median(short)).tobytes()
    return int.from_bytes(bits, "big"), np.packbits(long > np.median(long)).tobytes()


@cache
def _cosines() -> Any:
    n = np.arange(HASH_SIDE)
    return np.cos(np.pi * (2 * n[None] + 1) * np.arange(16)[:, None] / (2 * HASH_SIDE)).astype(np.float32)

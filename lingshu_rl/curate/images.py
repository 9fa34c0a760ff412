"""What makes two pictures the same one: a perceptual hash finds candidates, an alignment of the pixels decides.

A 64-bit hash alone cannot tell a re-saved chest X-ray from the next film of the same patient. Here the hash only
proposes: a pair counts as near duplicate when, after a small affine alignment, the fine structure of both correlates.
Mirror images are different pictures (left and right matter), so they are never matched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lingshu_rl.failures import LingshuError
from lingshu_rl.imaging.images import opened

if TYPE_CHECKING:
    from PIL.Image import Image

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
SURE = 0.985  # ... and from which on the parts need not be looked at; two films of a patient reach 0.976
PART = 9  # thumbnail pixels a side of a part
PARTS = (
    0.92  # mean correlation of the worst fifth of all parts; altered copies have 0.93 and more, two films up to 0.91
)
PLAIN = 0.35  # of the fine structure's standard deviation; a part with less has nothing to compare
RIM = 5  # thumbnail pixels at each side that the comparison leaves out
STOP = (3, 40, 1e-4)  # the alignment ends after 40 rounds, or when the correlation gains less than this
FLAT = 2.0  # grey levels; below this standard deviation a picture has no structure to compare
FEATURES = 2  # of what is computed below: a change makes stored features stale
BORDER = 10  # grey levels in which the pixels of a bar at the rim may differ: JPEG noise
LEAST_BAR = 0.02  # of a side; thinner bars move nothing
LEAST_CONTENT = 0.2  # of a side; a picture that is bars beyond that is taken as it is
CUT = 0.045  # share of a side that a one-sided cut takes in VARIANTS; half and one and a half of it are near enough


@dataclass(frozen=True)
class Change:
    """How a query is changed before it is hashed, so that its twin is near whichever way one of them was changed.

    turn: degrees. zoom: about the centre. cut: shares of (left, top, right, bottom) that the picture has lost against
    its twin; below 0 what the twin has lost against it.
    """

    turn: float = 0.0
    zoom: float = 1.0
    cut: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def window(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the hashed part, in shares of the picture: where the twin's centre lies."""
        left, top, right, bottom = self.cut
        x, y = (_shared(left, right), _shared(top, bottom))
        return x[0], y[0], x[1], y[1]


def _shared(before: float, after: float) -> tuple[float, float]:
    """Where on one axis the twin's hashed centre lies in a picture that lost these shares of it."""
    rim = (1 - CENTRE) / 2
    whole = 1 - max(before, 0) - max(after, 0)  # of the twin, as the picture shows it
    start, end = -max(before, 0) / whole, 1 + max(after, 0) / whole
    start, end = start + max(-before, 0), end - max(-after, 0)
    return start + rim * (end - start), end - rim * (end - start)


def _cuts() -> Iterator[tuple[float, float, float, float]]:
    """One side, or two that meet, cut off the picture or off its twin."""
    for sign in (CUT, -CUT):
        for left, right in ((0, 0), (sign, 0), (0, sign)):
            for top, bottom in ((0, 0), (sign, 0), (0, sign)):
                if left or right or top or bottom:
                    yield left, top, right, bottom


VARIANTS = (
    *(Change(turn) for turn in (0, -2, 2, -4, 4, -6, 6)),
    *(Change(0, zoom) for zoom in (0.95, 1.055, 0.91, 1.1)),
    *(Change(turn, zoom) for turn in (-3, 3) for zoom in (0.95, 1.055)),
    *(Change(turn, zoom) for turn in (-5, 5) for zoom in (0.92, 1.085)),
    *(Change(cut=cut) for cut in _cuts()),
)


class ImageError(LingshuError, ValueError):
    """Why a picture cannot be read."""


@dataclass(frozen=True)
class View:
    """One way to look at a picture. thumb: 64 x 64 grey. queries: the 64- and 256-bit hash (32 bytes) of every entry of
    VARIANTS; the first is of the view as it is.
    """

    thumb: bytes
    queries: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Features:
    """sha: of the file's bytes. pixels: of size, mode and decoded pixels. std: grey levels. sharpness: variance of the
    Laplacian of the 256-pixel grey picture. views: of the whole, and of the content where bars stand at the rim: what
    looks like a bar in one of two pictures may not in the other.
    """

    sha: str
    pixels: str
    width: int
    height: int
    std: float
    sharpness: float
    views: tuple[View, ...]

    @property
    def flat(self) -> bool:
        return self.std < FLAT


def features(image: str | bytes) -> Features:
    """Features of an image file or encoded bytes. Raises ImageError."""
    import cv2

    try:
        data = Path(image).read_bytes() if isinstance(image, str) else image
        with opened(data) as found:
            found.load()
            picture: Image = found
            if "A" in picture.getbands() or picture.mode == "P":
                picture = picture.convert("RGBA").convert("RGB")
    except OSError as error:
        raise ImageError(str(error)) from error
    if picture.mode.startswith(("I", "F")):
        raise ImageError("over 8 bits a channel: choose a window (`scan: {window: [centre, width]}` of its source)")
    size = picture.size
    digest = hashlib.sha256(f"{picture.mode}{size}".encode() + picture.tobytes()).hexdigest()
    if max(size) > 2 * GREY:  # a box filter first: the cosine transform must not see aliasing
        picture = picture.reduce(max(size) // GREY)
    grey = picture.convert("L")
    pixels, *contents = [_thumbnail(grey.crop(box)) for box in view_boxes(np.asarray(grey))]
    std = float(pixels.std())
    sharpness = float(cv2.Laplacian(pixels, cv2.CV_32F).var())
    sha = hashlib.sha256(data).hexdigest()
    return Features(sha, digest, *size, std, sharpness, tuple(_view(part) for part in (pixels, *contents)))


def _view(pixels: np.ndarray) -> View:
    import cv2

    thumb = cv2.resize(pixels, (THUMB, THUMB), interpolation=cv2.INTER_AREA)
    return View(thumb.tobytes(), tuple(_hashes(_hashed_part(pixels, variant)) for variant in VARIANTS))


def view_boxes(grey: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the whole, and of the content if bars take a noticeable part."""
    height, width = grey.shape
    left, top, right, bottom = content = content_box(grey)
    seen = width - (right - left) >= LEAST_BAR * width or height - (bottom - top) >= LEAST_BAR * height
    return [(0, 0, width, height), *([content] if seen else [])]


def content_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) without bars of one grey at the rim: padding and letterboxes are no part of a
    picture."""
    top, bottom = _without_bars(grey)
    left, right = _without_bars(grey.T)
    return left, top, right, bottom


def _without_bars(rows: np.ndarray) -> tuple[int, int]:
    """First row that is no bar, and the one after the last."""
    low, high = rows.min(1).astype(int), rows.max(1).astype(int)
    count = len(rows)

    def bar(order: range) -> int:
        grey = np.median(rows[order[0]])
        inside = [bool(low[i] >= grey - BORDER and high[i] <= grey + BORDER) for i in order]
        return inside.index(False) if False in inside else count

    start, end = bar(range(count)), count - bar(range(count - 1, -1, -1))
    return (start, end) if end - start >= max(8, LEAST_CONTENT * count) else (0, count)


def _thumbnail(grey: Any) -> np.ndarray:
    from PIL import Image

    small = grey.copy()
    small.thumbnail((GREY, GREY), Image.Resampling.LANCZOS)
    return np.asarray(small)


def distance(a: int, b: int) -> int:
    """Differing bits of two short hashes."""
    return (a ^ b).bit_count()


def likeness(a: bytes, b: bytes, variant: int) -> float:
    """Correlation in [-1, 1] of two thumbnails' fine structure after the best affine alignment; -1 where none is found,
    or where it is not beyond doubt and some part of the picture does not agree.

    variant: index into VARIANTS from which the alignment starts. The alignment is the enhanced correlation coefficient
    (Evangelidis and Psarakis 2008, as in OpenCV); the score leaves out a rim and everything coarser than 4 pixels, in
    which all chest films agree.
    """
    import cv2

    first, second = (np.frombuffer(t, np.uint8).reshape(THUMB, THUMB).astype(np.float32) for t in (a, b))
    # Only the middle of the second is sought in the first: a picture cut a little smaller still covers it.
    side = THUMB - 2 * RIM
    warp = _start(VARIANTS[variant])
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
    moved, middle = _fine(moved), _fine(middle)
    score = _correlation(moved[seen], middle[seen])
    return score if score >= SURE or _parts_agree(moved, middle, seen) else -1.0


def _parts_agree(a: np.ndarray, b: np.ndarray, seen: np.ndarray) -> bool:
    """Whether the worst fifth of all parts still correlates: the next film of a patient differs in a few places
    only."""
    least = PLAIN * float(b[seen].std())
    found = []
    for top in range(0, len(a) - PART + 1, PART):
        for left in range(0, len(a) - PART + 1, PART):
            place = np.s_[top : top + PART, left : left + PART]
            x, y = a[place][seen[place]], b[place][seen[place]]
            if x.size >= 0.8 * PART * PART and max(x.std(), y.std()) >= least:
                found.append(_correlation(x, y))
    worst = sorted(found)[: max(1, len(found) // 5)]
    return not worst or float(np.mean(worst)) >= PARTS


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else -1.0


def _fine(x: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(x, (0, 0), 0.8) - cv2.GaussianBlur(x, (0, 0), 4)


def _start(variant: Change) -> Any:
    """The affine map from a thumbnail to that of the query, as far as the variant tells it."""
    import cv2

    if any(variant.cut):
        left, top, right, bottom = variant.window
        x, y = (right - left) / CENTRE, (bottom - top) / CENTRE
        rim = (1 - CENTRE) / 2
        return np.array([[x, 0, (left - rim * x) * THUMB], [0, y, (top - rim * y) * THUMB]])
    centre = (THUMB - 1) / 2
    turned: Any = cv2.getRotationMatrix2D((centre, centre), variant.turn, variant.zoom)
    return cv2.invertAffineTransform(turned)


def _hashed_part(pixels: np.ndarray, variant: Change) -> np.ndarray:
    """The centre of the picture after turning and enlarging it, or the window where a cut twin has its centre."""
    import cv2

    height, width = pixels.shape
    if variant.turn or variant.zoom != 1:
        turned = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), variant.turn, variant.zoom)
        pixels = cv2.warpAffine(pixels, turned, (width, height), flags=cv2.INTER_LINEAR)
    left, top, right, bottom = variant.window
    rows = slice(max(0, round(top * height)), min(height, round(bottom * height)))
    return pixels[rows, max(0, round(left * width)) : min(width, round(right * width))]


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

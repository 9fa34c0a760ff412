"""Text burnt into the corners of a picture, where scanners print names, numbers and dates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lingshu_rl.curate.items import Context, Dropped, Item
from lingshu_rl.curate.readers import image_folder
from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.imaging.images import opened

CORNER = (0.18, 0.45)  # share of height and width that a corner takes
MIN_GLYPHS = 5  # characters in one line


@dataclass(frozen=True)
class BurnedText:
    """Look for lines of characters in the four corners. action: "drop" the row, "mask" those corners black in a copy,
    or "flag" them in meta.burned_text. A heuristic: it finds bright printed text on a darker, even ground.
    """

    name: ClassVar[str] = "burned_text"
    action: str = "drop"

    def __post_init__(self) -> None:
        if self.action not in ("drop", "mask", "flag"):
            raise ValueError(f"burned_text.action={self.action!r} is not one of drop, mask, flag")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        keep = image_folder(context.cache.parent / "images")
        known: tuple[str, list[str]] = ("", [])  # rows about one picture follow each other
        for item in rows:
            found: dict[str, list[str]] = {}
            try:
                for path in item.row["images"]:
                    if path != known[0]:
                        with opened(path) as picture:
                            known = (path, text_corners(np.asarray(picture.convert("L"))))
                    if known[1]:
                        found[path] = known[1]
            except UnreadablePicture as error:
                yield Dropped.item(item, "unreadable_image", str(error))
                continue
            if not found:
                yield item
                continue
            told = ", ".join(sorted({corner for corners in found.values() for corner in corners}))
            if self.action == "drop":
                yield Dropped.item(item, "burned_in_text", told)
                continue
            context.count(f"rows_{'masked' if self.action == 'mask' else 'flagged'}")
            item = item.with_meta(burned_text=told)
            if self.action == "mask":
                masked = {path: keep(mask_corners(Path(path), corners)) for path, corners in found.items()}
                for path in masked.values():
                    context.looked(str(path))
                item = item.with_row(images=[masked.get(path, path) for path in item.row["images"]])
            yield item


def corner_boxes(height: int, width: int) -> dict[str, tuple[slice, slice]]:
    h, w = max(1, round(height * CORNER[0])), max(1, round(width * CORNER[1]))
    top, bottom, left, right = slice(0, h), slice(height - h, height), slice(0, w), slice(width - w, width)
    return {
        "top left": (top, left),
        "top right": (top, right),
        "bottom left": (bottom, left),
        "bottom right": (bottom, right),
    }


def text_corners(grey: np.ndarray) -> list[str]:
    """Names of the corners of a uint8 (height, width) picture that hold a line of characters."""
    boxes = corner_boxes(*grey.shape)
    return [name for name, (rows, columns) in boxes.items() if has_text_line(grey[rows, columns], max(grey.shape))]


def has_text_line(corner: np.ndarray, side: int) -> bool:
    """Whether at least MIN_GLYPHS bright pieces of one height stand side by side. side: of the whole picture, in
    pixels."""
    import cv2

    # Strokes are thin: what an opening wider than a stroke takes away. Anatomy's edges are soft and stay below the
    # level.
    stroke = max(3, round(side / 60) | 1)
    thin = cv2.morphologyEx(corner, cv2.MORPH_TOPHAT, cv2.getStructuringElement(cv2.MORPH_RECT, (stroke, stroke)))
    bright = (thin > 70).astype(np.uint8)
    _, _, stats, centres = cv2.connectedComponentsWithStats(bright, connectivity=8)
    glyphs: list[tuple[float, float, float, float]] = []
    for (_, top, width, height, area), (x, _) in zip(stats[1:].tolist(), centres[1:].tolist(), strict=True):
        if 5 <= height <= 0.06 * side + 4 and width <= 1.6 * height and area / (width * height) >= 0.15 and area >= 6:
            glyphs.append((x, top + height, height, width))
    for _, base, height, _ in glyphs:
        line = sorted(g[0] for g in glyphs if abs(g[1] - base) <= 0.2 * height + 1 and 0.6 <= g[2] / height <= 1.6)
        run = 1
        for a, b in pairwise(line):
            run = run + 1 if b - a <= 2.2 * height else 1
            if run >= MIN_GLYPHS:
                return True
    return False


def mask_corners(path: Path, corners: list[str]) -> bytes:
    """The picture as PNG with these corners black."""
    import io

    from PIL import Image

    with opened(path) as picture:
        pixels: Any = np.array(picture.convert("RGB" if picture.mode not in ("L", "1") else "L"))
    boxes = corner_boxes(*pixels.shape[:2])
    for corner in corners:
        pixels[boxes[corner]] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()

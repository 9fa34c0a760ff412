"""Regions of an image from its masks or boxes: where, how large, how many. Facts that need no reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.imaging.images import opened
from lingshu_rl.synth.rows import Record, SynthError

if TYPE_CHECKING:
    import numpy as np

MIDDLE = 0.1  # of the image's side around its centre line, where a region lies on neither side
SMALLEST_PART = 4  # pixels; fewer are noise of the mask, not a part


@dataclass(frozen=True)
class Region:
    """One named structure of one image. box: left, top, width, height in pixels.

    share: of the image's area. parts: connected parts (8-neighbours), or for label masks the labels; 0 where a box is
    all that is known. side, level: "left", "right", "upper", "lower" of the image, "" across the centre line.
    """

    name: str
    box: tuple[float, float, float, float]
    image_size: tuple[int, int]  # width, height
    share: float | None = None
    parts: int = 0

    @property
    def side(self) -> str:
        return _half(self.box[0] / self.image_size[0], self.box[2] / self.image_size[0], ("left", "right"))

    @property
    def level(self) -> str:
        return _half(self.box[1] / self.image_size[1], self.box[3] / self.image_size[1], ("upper", "lower"))

    def describe(self) -> str:
        x, y, w, h = (round(v) for v in self.box)
        where = " ".join(word for word in (self.level, self.side) if word)
        size = f", {100 * self.share:.1f} % of the image" if self.share is not None else ""
        return f"{self.name}: box x {x} to {x + w}, y {y} to {y + h}{f', in the {where} part' if where else ''}{size}"


def _half(start: float, length: float, names: tuple[str, str]) -> str:
    """The half that holds the whole span, unless its centre is near the line."""
    if start + length <= 0.5 and start + length / 2 <= 0.5 - MIDDLE:
        return names[0]
    return names[1] if start >= 0.5 and start + length / 2 >= 0.5 + MIDDLE else ""


def regions_of(record: Record) -> list[Region]:
    """From `masks`, then `boxes`. Raises SynthError for a mask that does not fit its image or names what is not in
    it."""
    found: list[Region] = []
    if not record.get("masks") and not record.get("boxes"):
        return found
    size = image_size(record)
    for mask in record.get("masks") or []:
        found += mask_regions(record, mask, size)
    for box in record.get("boxes") or []:
        x, y, w, h = (float(v) for v in box["xywh"])
        if w <= 0 or h <= 0 or x < 0 or y < 0 or x + w > size[0] + 1 or y + h > size[1] + 1:
            raise SynthError(f"record {record['id']!r}: box {box['xywh']} of {box['name']!r} leaves the image {size}")
        found.append(Region(str(box["name"]), (x, y, w, h), size))
    return found


def mask_regions(record: Record, mask: dict[str, Any], size: tuple[int, int]) -> list[Region]:
    """`names`: {"1": "liver", "2": "tumour"}; "*" names every other value above 0, each value one part (instances)."""
    import numpy as np

    values = read_mask(mask["path"])
    if values.shape != (size[1], size[0]):
        raise SynthError(f"record {record['id']!r}: mask {mask['path']} is {values.shape[::-1]}, its image {size}")
    named = {int(value): name for value, name in mask["names"].items() if value != "*"}
    present = {int(v) for v in np.unique(values)} - {0}
    found = []
    for name in dict.fromkeys(mask["names"].values()):
        labels = [value for value, n in named.items() if n == name]
        instances = mask["names"].get("*") == name
        if instances:
            labels += sorted(present - named.keys())
        inside = np.isin(values, labels)
        if not inside.any():
            continue
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        left, top = float(columns[0]), float(rows[0])
        box = (left, top, float(columns[-1]) - left + 1, float(rows[-1]) - top + 1)
        parts = len(set(labels) & present) if instances else count_parts(inside)
        found.append(Region(str(name), box, size, float(inside.mean()), parts))
    return found


def count_parts(inside: np.ndarray) -> int:
    import numpy as np
    from scipy import ndimage

    labels, count = ndimage.label(inside, structure=np.ones((3, 3)))
    return int((np.bincount(labels.ravel())[1:] >= SMALLEST_PART).sum()) if count else 0


def read_mask(path: str) -> np.ndarray:
    """Integer labels, (height, width), from a PNG or TIFF in one channel, or a .npy file."""
    import numpy as np

    try:
        if Path(path).suffix == ".npy":
            values = np.load(path, mmap_mode="r")  # a header that claims more than the file holds is found out
        else:
            with opened(path) as image:
                values = np.asarray(image)
    except (OSError, ValueError) as error:
        raise SynthError(f"mask {path} cannot be read: {error}") from None
    if values.ndim != 2:
        raise SynthError(f"mask {path} has shape {values.shape}; a mask has one channel of label numbers")
    return values.astype("int64")


def image_size(record: Record) -> tuple[int, int]:
    """Width and height of the record's first image."""
    if not record.get("images"):
        raise SynthError(f"record {record['id']!r} has masks or boxes but no image")
    try:
        with opened(record["images"][0]) as image:
            return image.size
    except OSError as error:
        raise SynthError(f"record {record['id']!r}: {error}") from None


def with_boxes(image: bytes, regions: Sequence[Region]) -> bytes:
    """The picture with a numbered frame around every region, as PNG: what the writer looks at for a factual caption."""
    import io

    from PIL import ImageDraw

    with opened(image) as found:
        picture = found.convert("RGB")
    draw = ImageDraw.Draw(picture)
    for number, region in enumerate(regions, start=1):
        x, y, w, h = region.box
        draw.rectangle((x, y, x + w, y + h), outline=(255, 220, 0), width=max(1, min(picture.size) // 200))
        draw.text((x + 2, y + 1), str(number), fill=(255, 220, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

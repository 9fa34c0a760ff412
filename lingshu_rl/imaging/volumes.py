"""CT and MR volumes as slices of a row: `{"volume": "ct.nii.gz", "slices": 16, "plane": "axial", "window": [40, 400]}`.

A volume is a NIfTI file, a folder of one DICOM series or a multi-frame DICOM file. Slices become views: names such as
`ct.nii.gz#axial=3,9;window=40,400` that stand wherever an image's path may. Whatever way a volume is stored, its axes
are turned to right, front and top first; slices are upright, with the patient's left on the right and square pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.imaging.files import full_path
from lingshu_rl.imaging.pixels import PLANES
from lingshu_rl.imaging.voxels import VolumeError, grid_of, read_voxels, slice_picture, stamp_of

if TYPE_CHECKING:
    from PIL.Image import Image

KEYS = ("volume", "slices", "plane", "window", "layout", "mask", "label")
FILES = ("volume", "mask")  # the keys that name files
LAYOUTS = ("stack", "montage")
SLICES = 16

_VIEW = re.compile(
    r"(?P<file>.+)#(?P<plane>sagittal|coronal|axial)=(?P<indices>\d{1,6}(?:,\d{1,6})*)"
    r"(?:;window=(?P<centre>-?[\d.]{1,12}),(?P<width>[\d.]{1,12}))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class View:
    """Slices of a volume as one picture. indices: along the plane's axis, from left, back or bottom; more than one are
    a montage in reading order. window: (centre, width) in the volume's units; empty: the middle 99 % of its values.
    """

    file: str
    plane: str
    indices: tuple[int, ...]
    window: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str) -> View | None:
        """The view that a text names, or None for another path."""
        if not (found := _VIEW.fullmatch(name)):
            return None
        try:
            window = () if found["centre"] is None else (float(found["centre"]), float(found["width"]))
        except ValueError:
            return None
        return cls(found["file"], found["plane"], tuple(map(int, found["indices"].split(","))), window)

    @property
    def name(self) -> str:
        window = f";window={self.window[0]:g},{self.window[1]:g}" if self.window else ""
        return f"{self.file}#{self.plane}={','.join(map(str, self.indices))}{window}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, from the header alone. Raises VolumeError."""
        grid = grid_of(self.file)
        axis = PLANES.index(self.plane)
        if max(self.indices) >= grid.shape[axis]:
            raise VolumeError(f"{self.file} has {grid.shape[axis]} {self.plane} slices, asked is {max(self.indices)}")
        (width, height), across = grid.slice_size(axis), self._across
        return width * across, height * math.ceil(len(self.indices) / across)

    @property
    def _across(self) -> int:
        return math.ceil(math.sqrt(len(self.indices)))

    def image(self) -> Image:
        """Grey, 8 bits. Raises VolumeError."""
        from PIL import Image

        width, height = grid_of(self.file).slice_size(PLANES.index(self.plane))
        picture = Image.new("L", self.size)
        for place, index in enumerate(self.indices):
            row, column = divmod(place, self._across)
            picture.paste(slice_picture(self.file, self.plane, index, self.window), (column * width, row * height))
        return picture


def unfold(row: Mapping[str, Any], base_dir: str | Path | None) -> Mapping[str, Any]:
    """The row with the views of its volumes as images, and as many image parts in its messages. Raises VolumeError."""
    images = row.get("images")
    if not isinstance(images, list | tuple) or not any(map(is_volume, images)):
        return row
    views = [views_of(image, base_dir) if is_volume(image) else [image] for image in images]
    counts = iter([len(view) for view in views])
    messages = row.get("messages")
    if isinstance(messages, list | tuple):
        messages = [_multiplied(turn, counts) for turn in messages]
    changed = {**row, "images": [image for view in views for image in view]}
    return changed if messages is None else {**changed, "messages": messages}


def is_volume(image: Any) -> bool:
    return isinstance(image, Mapping) and image.get("volume") is not None


def as_volumes(row: Any, settings: Mapping[str, Any]) -> Any:
    """A row whose images, where they are paths, are volumes with a source's settings; as it is where there are none."""
    images = row.get("images") if settings and isinstance(row, Mapping) else None
    if not isinstance(images, list | tuple):
        return row
    return {**row, "images": [{"volume": i, **settings} if isinstance(i, str) else i for i in images]}


def _multiplied(turn: Any, counts: Any) -> Any:
    """A turn of a conversation, each image part as often as its volume has views."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(content, list | tuple):
        return turn
    images = [isinstance(part, Mapping) and part.get("type") == "image" for part in content]
    parts = [part for part, image in zip(content, images, strict=True) for _ in range(next(counts, 1) if image else 1)]
    return {**turn, "content": parts}


def views_of(asked: Mapping[str, Any], base_dir: str | Path | None) -> list[str]:
    """Names of the views that a row's `{"volume": ...}` asks for. Raises VolumeError.

    slices: how many, at most (all of a volume that has fewer): the middles of as many equal parts of the plane's axis,
    or of the part of it where `mask` (a volume of the same grid) is not 0, or is `label`; or a list of indices.
    layout: "stack" makes an image of every slice, "montage" one of all.
    """
    asked = {key: value for key, value in asked.items() if value is not None}
    if unknown := sorted(set(asked) - set(KEYS)):
        raise VolumeError(f"a volume has {', '.join(KEYS)}; got {', '.join(map(repr, unknown))}")
    file = _resolved(asked["volume"], base_dir)
    plane = _one_of(asked, "plane", PLANES, "axial")
    layout = _one_of(asked, "layout", LAYOUTS, "stack")
    window = _window(asked.get("window"))
    indices = _indices(asked, file, PLANES.index(plane), base_dir)
    pictures = [indices] if layout == "montage" else [(index,) for index in indices]
    return [View(file, plane, picture, window).name for picture in pictures]


def _indices(asked: Mapping[str, Any], file: str, axis: int, base_dir: str | Path | None) -> tuple[int, ...]:
    depth = grid_of(file).shape[axis]
    slices = asked.get("slices", SLICES)
    if isinstance(slices, Sequence) and not isinstance(slices, str):
        if "mask" in asked:
            raise VolumeError("a volume's slices are a list or around a mask, not both")
        if not slices or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < depth for n in slices):
            raise VolumeError(f"slices of {file} are whole numbers from 0 to {depth - 1}, got {list(slices)}")
        return tuple(slices)
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise VolumeError(f"slices are how many, at least 1, or a list of indices; got {slices!r}")
    first, last = (0, depth) if "mask" not in asked else _extent(asked, file, axis, base_dir)
    return spread(first, last, slices)


def spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """The middles of `count` equal parts of the slices from `first` to before `last`; all of them if there are no
    more."""
    if last - first <= count:
        return tuple(range(first, last))
    return tuple(first + int((part + 0.5) * (last - first) / count) for part in range(count))


def _extent(asked: Mapping[str, Any], file: str, axis: int, base_dir: str | Path | None) -> tuple[int, int]:
    """First slice of a mask, and the one after its last."""
    mask = _resolved(asked["mask"], base_dir)
    if grid_of(mask).shape != (shape := grid_of(file).shape):
        raise VolumeError(f"mask {mask} has {grid_of(mask).shape} voxels, {file} has {shape}")
    return _found_in(mask, stamp_of(mask), axis, asked.get("label"))


@lru_cache(maxsize=4096)
def _found_in(mask: str, stamp: tuple[int, int], axis: int, label: Any) -> tuple[int, int]:
    import numpy as np

    values = read_voxels(mask).values
    inside = (values != 0) if label is None else (values == label)
    found = np.flatnonzero(inside.any(axis=tuple(n for n in range(3) if n != axis)))
    if not found.size:
        raise VolumeError(f"mask {mask} is empty{'' if label is None else f' of label {label!r}'}")
    return int(found[0]), int(found[-1]) + 1


def _resolved(name: Any, base_dir: str | Path | None) -> str:
    if not isinstance(name, str | Path) or not str(name).strip():
        raise VolumeError(f"a volume is the path of a file or folder, got {name!r}")
    return full_path(name, base_dir or ".")


def _one_of(asked: Mapping[str, Any], key: str, known: Sequence[str], default: str) -> str:
    if (value := asked.get(key, default)) not in known:
        raise VolumeError(f"{key} of a volume is one of {', '.join(known)}; got {value!r}")
    return value


def _window(value: Any) -> tuple[float, ...]:
    if value is None or value == []:
        return ()
    numbers = value if isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value) else ()
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise VolumeError(f"window of a volume is [centre, width] with a width above 0, got {value!r}")
    return tuple(float(f"{x:g}") for x in numbers)

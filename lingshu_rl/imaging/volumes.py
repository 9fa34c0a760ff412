"""CT and MR volumes as slices of a row: `{"volume": "ct.nii.gz", "slices": 16, "plane": "axial", "window": [40, 400]}`.

A volume is a NIfTI file, a folder of one DICOM series or a multi-frame DICOM file. Slices become views: names such as
`ct.nii.gz#axial=3,9;window=40,400` that stand wherever an image's path may. Whatever way a volume is stored, its axes
are turned to right, front and top first; slices are upright, with the patient's left on the right and square pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import LingshuError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CACHE_ENV = "LINGSHU_RL_CACHE"  # folder of decoded slices; by default lingshu_rl/slices in the user's cache
KEYS = ("volume", "slices", "plane", "window", "layout", "mask", "label")
FILES = ("volume", "mask")  # the keys that name files
PLANES = ("sagittal", "coronal", "axial")  # the axes to the right, front and top
LAYOUTS = ("stack", "montage")
SLICES = 16
DENSEST = 1100  # bytes that a byte of a file can stand for: deflate reaches 1,032

_VIEW = re.compile(
    r"(?P<file>.+)#(?P<plane>sagittal|coronal|axial)=(?P<indices>\d{1,6}(?:,\d{1,6})*)"
    r"(?:;window=(?P<centre>-?[\d.]{1,12}),(?P<width>[\d.]{1,12}))?",
    re.DOTALL,
)
_DECODING = threading.Lock()  # of a volume: its slices are asked for by several threads at once


class VolumeError(LingshuError, ValueError):
    """A volume or its slices cannot be used; the text names the file."""


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
            picture.paste(_slice(self.file, self.plane, index, self.window), (column * width, row * height))
        return picture


@dataclass(frozen=True)
class Grid:
    """What a volume's header says. shape: voxels to the right, front and top. spacing: millimetres."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def slice_size(self, axis: int) -> tuple[int, int]:
        """Width and height of a slice across this axis, with square pixels of the smaller spacing."""
        from lingshu_rl.imaging.scans import square_size

        columns, rows = (n for n in range(3) if n != axis)
        return square_size(self.shape[columns], self.shape[rows], self.spacing[rows], self.spacing[columns])


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
    return _found_in(mask, _stamp(mask), axis, asked.get("label"))


@lru_cache(maxsize=4096)
def _found_in(mask: str, stamp: tuple[int, int], axis: int, label: Any) -> tuple[int, int]:
    import numpy as np

    values = _read(mask).values
    inside = (values != 0) if label is None else (values == label)
    found = np.flatnonzero(inside.any(axis=tuple(n for n in range(3) if n != axis)))
    if not found.size:
        raise VolumeError(f"mask {mask} is empty{'' if label is None else f' of label {label!r}'}")
    return int(found[0]), int(found[-1]) + 1


def _resolved(name: Any, base_dir: str | Path | None) -> str:
    from lingshu_rl.data.rows import full_path

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


# ---------------------------------------------------------------------------------------------------------- the files


def content_size(file: str) -> int:
    """Bytes of a volume's file, or of its folder's files."""
    path = Path(file)
    return sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size


def _stamp(file: str) -> tuple[int, int]:
    """Of the content: changes when the file, or a file of the folder, does."""
    path = Path(file)
    try:
        found = [f.stat() for f in path.iterdir()] if path.is_dir() else [path.stat()]
    except OSError as error:
        raise VolumeError(f"volume not found: {file} ({error.strerror})") from None
    return sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)


def grid_of(file: str) -> Grid:
    """Raises VolumeError."""
    return _grid(file, _stamp(file))


@lru_cache(maxsize=4096)
def _grid(file: str, stamp: tuple[int, int]) -> Grid:
    stored = _stored(file)
    order = [int(axis) for axis in stored.turn[:, 0]]
    shape, spacing = [0, 0, 0], [0.0, 0.0, 0.0]
    for place, axis in enumerate(order):
        shape[axis], spacing[axis] = stored.shape[place], stored.spacing[place]
    return Grid((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]))


@dataclass(frozen=True)
class Stored:
    """A volume as its files hold it. turn: nibabel's orientation to right, front and top. load: voxels in stored order
    with the slope and intercept of their units.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    turn: np.ndarray
    load: Any


def _stored(file: str) -> Stored:
    from lingshu_rl.imaging.scans import ScanError, scan_kind

    path = Path(file)
    kind = "dicom" if path.is_dir() else scan_kind(path)
    if kind not in ("nifti", "dicom"):
        raise VolumeError(
            f"{file} is no volume: a NIfTI file, a folder of one DICOM series or a multi-frame DICOM file"
        )
    try:
        stored = _nifti(file) if kind == "nifti" else _dicom(path)
    except VolumeError:
        raise
    except ScanError as error:
        raise VolumeError(str(error)) from error
    except Exception as error:  # nibabel, pydicom and zlib raise their own kinds
        raise VolumeError(f"{file}: not a readable volume: {type(error).__name__}: {error}") from error
    voxels = math.prod(stored.shape)
    if min(stored.shape) < 1 or voxels > DENSEST * content_size(file):
        raise VolumeError(f"{file}: its header claims {voxels:,} voxels, more than its bytes can hold")
    if not all(math.isfinite(x) and x > 0 for x in stored.spacing):
        raise VolumeError(f"{file}: its header claims a spacing of {stored.spacing} mm")
    return stored


def _nifti(file: str) -> Stored:
    import nibabel
    import numpy as np

    from lingshu_rl.imaging.nifti import check_size

    found: Any = nibabel.load(file)
    check_size(Path(file), found)
    shape = tuple(int(n) for n in found.shape)
    if len(shape) < 3 or math.prod(shape[3:]) != 1:
        raise VolumeError(f"{file}: has {' x '.join(map(str, shape))} voxels; a volume has three axes")

    def load() -> tuple[np.ndarray, float, float]:
        slope, intercept = (float(x) for x in (found.dataobj.slope, found.dataobj.inter))
        return np.asarray(found.dataobj.get_unscaled()).reshape(shape[:3]), slope, intercept

    spacing = tuple(float(x) for x in found.header.get_zooms()[:3])
    return Stored(shape[:3], spacing, nibabel.io_orientation(found.affine), load)


def _dicom(path: Path) -> Stored:
    """The slices of one series in the order of their positions; DICOM's axes run to the left and back, NIfTI's do
    not."""
    import nibabel
    import numpy as np

    sections = sorted(_sections(path), key=lambda section: section.depth)
    first, last = sections[0], sections[-1]
    if len({(s.file if path.is_file() else "", s.series, s.shape) for s in sections}) > 1:
        raise VolumeError(f"{path}: holds several series or sizes of slices; give each its folder")
    gaps = np.diff([section.depth for section in sections])
    if len(gaps) and gaps.min() <= 1e-3:
        raise VolumeError(f"{path}: two slices stand at one position: several phases or series; give each its folder")
    step = float(np.median(gaps)) if len(gaps) else first.thickness
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.across * first.spacing[1], first.down * first.spacing[0]
    affine[:3, 2] = (
        (last.position - first.position) / len(gaps) if len(gaps) else np.cross(first.across, first.down) * step
    )
    affine[:2] *= -1

    def load() -> tuple[np.ndarray, float, float]:
        return np.stack([section.pixels() for section in sections], axis=-1).swapaxes(0, 1), 1.0, 0.0

    rows, columns = first.shape
    spacing = (first.spacing[1], first.spacing[0], step)
    return Stored((columns, rows, len(sections)), spacing, nibabel.io_orientation(affine), load)


@dataclass(frozen=True)
class Section:
    """One slice of a series. across, down: directions of its rows and columns. depth: of its position along their
    normal, mm."""

    file: Path
    frame: int
    series: str
    shape: tuple[int, int]
    position: np.ndarray
    across: np.ndarray
    down: np.ndarray
    spacing: tuple[float, float]
    thickness: float

    @property
    def depth(self) -> float:
        import numpy as np

        return float(np.cross(self.across, self.down) @ self.position)

    def pixels(self) -> np.ndarray:
        """Rows by columns, in the modality's units."""
        import numpy as np
        import pydicom
        from pydicom.pixels import apply_modality_lut

        from lingshu_rl.imaging.dicom import frame_header, stored_pixels

        _check_frames(self.file, _stamp(str(self.file)))
        header = pydicom.dcmread(self.file, stop_before_pixels=True)
        stored = stored_pixels(self.file, header, self.frame)
        return np.asarray(apply_modality_lut(stored, frame_header(header, self.frame)), np.float32)


def _sections(path: Path) -> list[Section]:
    import pydicom

    from lingshu_rl.imaging.scans import scan_files

    found = []
    for file in scan_files(path, "dicom"):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        if int(header.get("SamplesPerPixel", 1)) != 1:
            raise VolumeError(f"{file}: a coloured picture is no slice of a volume")
        frames = int(header.get("NumberOfFrames", 1) or 1)
        if frames > DENSEST * file.stat().st_size:
            raise VolumeError(f"{file}: its header claims {frames:,} frames, more than its bytes can hold")
        found += [_section(file, header, frame) for frame in range(frames)]
    if not found:
        raise VolumeError(f"{path}: holds no DICOM file")
    return found


def _section(file: Path, header: Any, frame: int) -> Section:
    """Where a frame lies: its own functional group, that of all frames, or the top of the header."""
    import numpy as np

    groups = [header]
    for name, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        if place < len(sequence := header.get(name) or ()):
            groups[:0] = [item for element in sequence[place] if element.VR == "SQ" for item in element.value[:1]]

    def said(name: str) -> Any:
        return next((group.get(name) for group in groups if group.get(name) is not None), None)

    position, orientation, spacing = (
        said(name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    if position is None or orientation is None or spacing is None:
        raise VolumeError(f"{file}: says no position, orientation and spacing, as slices of a volume do")
    directions = np.array([float(x) for x in orientation])
    return Section(
        file,
        frame,
        str(header.get("SeriesInstanceUID", "")),
        (int(header.Rows), int(header.Columns)),
        np.array([float(x) for x in position]),
        directions[:3],
        directions[3:],
        (float(spacing[0]), float(spacing[1])),
        float(said("SliceThickness") or 1.0),
    )


# ---------------------------------------------------------------------------------------------------------- the slices


@dataclass(frozen=True)
class Voxels:
    """values: to the right, front and top, as stored; units are `slope * value + intercept`. low, high: of its middle
    99 %."""

    values: np.ndarray
    slope: float
    intercept: float
    low: float
    high: float


@lru_cache(maxsize=2)
def _voxels(file: str, stamp: tuple[int, int]) -> Voxels:
    import nibabel
    import numpy as np

    stored = _stored(file)
    try:
        values, slope, intercept = stored.load()
    except VolumeError:
        raise
    except Exception as error:  # nibabel, pydicom and its decoders raise their own kinds
        raise VolumeError(f"{file}: not a readable volume: {type(error).__name__}: {error}") from error
    values = nibabel.apply_orientation(values, stored.turn)
    some = np.asarray(values[::2, ::2, ::2], np.float64) * slope + intercept
    some = some[np.isfinite(some)]
    low, high = np.percentile(some, (0.5, 99.5)) if some.size else (0.0, 0.0)
    return Voxels(values, slope, intercept, float(low), float(high))


@lru_cache(maxsize=4096)
def _check_frames(file: Path, stamp: tuple[int, int]) -> None:
    """Before a decoder sees them: once a file, however many of its frames are read. Raises ScanError."""
    from lingshu_rl.imaging.dicom import frames_of, read_header

    frames_of(file, read_header(file))


def _read(file: str) -> Voxels:
    with _DECODING:
        return _voxels(file, _stamp(file))


def _slice(file: str, plane: str, index: int, window: tuple[float, ...]) -> Image:
    """One slice, from the cache on disk or decoded. Raises VolumeError."""
    from lingshu_rl.imaging.images import UnreadablePicture, opened

    kept = _kept(file, plane, index, window)
    try:
        with opened(kept) as found:
            return found.convert("L")
    except UnreadablePicture:  # not there yet, or a file that is no longer whole
        image = _decoded(file, plane, index, window)
    part = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, "PNG", compress_level=1)
        os.replace(part, kept)
    except OSError:  # a full or read-only disk costs time, not the run
        with contextlib.suppress(OSError):
            part.unlink()
    return image


def _kept(file: str, plane: str, index: int, window: tuple[float, ...]) -> Path:
    told = hashlib.blake2b(repr((file, _stamp(file), plane, index, window)).encode(), digest_size=16).hexdigest()
    return cache_folder() / told[:2] / f"{told[2:]}.png"


def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lingshu_rl" / "slices"
    return Path(os.environ.get(CACHE_ENV) or default).expanduser()


def _decoded(file: str, plane: str, index: int, window: tuple[float, ...]) -> Image:
    from PIL import Image

    from lingshu_rl.imaging.scans import upright_slice

    volume, grid = _read(file), grid_of(file)
    shown = (window[0] - window[1] / 2, window[0] + window[1] / 2) if window else (volume.low, volume.high)
    turned = volume.values, PLANES.index(plane), index
    return Image.fromarray(upright_slice(*turned, shown, grid.spacing, volume.slope, volume.intercept))

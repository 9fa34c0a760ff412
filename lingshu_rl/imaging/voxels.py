"""What a volume's files hold, whichever way it is stored: its grid, its voxels, its slices as pictures."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import LingshuError
from lingshu_rl.imaging.dicom import frame_header, frames_of, read_header, stored_pixels
from lingshu_rl.imaging.files import UnreadablePicture, opened_file
from lingshu_rl.imaging.nifti import check_size
from lingshu_rl.imaging.pixels import PLANES, ScanError, scan_files, scan_kind, square_size, upright_slice

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CACHE_ENV = "LINGSHU_RL_CACHE"  # folder of decoded slices; by default lingshu_rl/slices in the user's cache
DENSEST = 1100  # bytes that a byte of a file can stand for: deflate reaches 1,032
_DECODING = threading.Lock()  # of a volume: its slices are asked for by several threads at once


class VolumeError(LingshuError, ValueError):
    """A volume or its slices cannot be used; the text names the file."""


@dataclass(frozen=True)
class Grid:
    """What a volume's header says. shape: voxels to the right, front and top. spacing: millimetres."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def slice_size(self, axis: int) -> tuple[int, int]:
        """Width and height of a slice across this axis, with square pixels of the smaller spacing."""
        columns, rows = (n for n in range(3) if n != axis)
        return square_size(self.shape[columns], self.shape[rows], self.spacing[rows], self.spacing[columns])


def content_size(file: str) -> int:
    """Bytes of a volume's file, or of its folder's files."""
    path = Path(file)
    return sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size


def stamp_of(file: str) -> tuple[int, int]:
    """Of the content: changes when the file, or a file of the folder, does."""
    path = Path(file)
    try:
        found = [f.stat() for f in path.iterdir()] if path.is_dir() else [path.stat()]
    except OSError as error:
        raise VolumeError(f"volume not found: {file} ({error.strerror})") from None
    return sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)


def grid_of(file: str) -> Grid:
    """Raises VolumeError."""
    return _grid(file, stamp_of(file))


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

        _check_frames(self.file, stamp_of(str(self.file)))
        header = pydicom.dcmread(self.file, stop_before_pixels=True)
        stored = stored_pixels(self.file, header, self.frame)
        return np.asarray(apply_modality_lut(stored, frame_header(header, self.frame)), np.float32)


def _sections(path: Path) -> list[Section]:
    import pydicom

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

    frames_of(file, read_header(file))


def read_voxels(file: str) -> Voxels:
    with _DECODING:
        return _voxels(file, stamp_of(file))


def slice_picture(file: str, plane: str, index: int, window: tuple[float, ...]) -> Image:
    """One slice, from the cache on disk or decoded. Raises VolumeError."""
    kept = _kept(file, plane, index, window)
    try:
        with opened_file(kept) as found:
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
    told = hashlib.blake2b(repr((file, stamp_of(file), plane, index, window)).encode(), digest_size=16).hexdigest()
    return cache_folder() / told[:2] / f"{told[2:]}.png"


def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lingshu_rl" / "slices"
    return Path(os.environ.get(CACHE_ENV) or default).expanduser()


def _decoded(file: str, plane: str, index: int, window: tuple[float, ...]) -> Image:
    from PIL import Image

    volume, grid = read_voxels(file), grid_of(file)
    shown = (window[0] - window[1] / 2, window[0] + window[1] / 2) if window else (volume.low, volume.high)
    turned = volume.values, PLANES.index(plane), index
    return Image.fromarray(upright_slice(*turned, shown, grid.spacing, volume.slope, volume.intercept))

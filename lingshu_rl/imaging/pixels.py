"""DICOM and NIfTI files as 8-bit pictures with spacing, without the patient.

Grey values pass the modality's scale, then a window (given, the file's own, or percentiles). Pixels become square. Text
comes from a short list of header fields only, with the patient's name, numbers and dates taken out; ids are keyed
hashes of the header's numbers or of the file's place in its source. What a file is, its first bytes say: archives name
DICOM files as they like.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.failures import LingshuError
from lingshu_rl.imaging.files import UnreadablePicture, opened_file

PSEUDONYM_KEY_ENV = "LINGSHU_RL_PSEUDONYM_KEY"  # secret of the keyed hashes; set it where ids must not be guessable
PLANES = ("sagittal", "coronal", "axial")  # NIfTI axes in RAS+ order
MOST_STRETCHED = 100  # a pixel's longer side over its shorter one
FRAMES = ("middle", "first", "all")
PICTURES = tuple(".png .jpg .jpeg .tif .tiff .bmp .gif .webp".split())  # never opened to see whether they are scans


class ScanError(LingshuError, ValueError):
    """A scan that gives no picture. reason: the code of the side file."""

    def __init__(self, message: str, reason: str = "unreadable_scan") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ScanOptions:
    """window: (centre, width) in the modality's units (Hounsfield for CT); empty: the file's own, else percentiles. It
    also makes 8 bits of pictures that have more (16-bit PNG or TIFF), in the units of their pixels.

    frames: of a multi-frame DICOM. plane, every_mm: which slices of a NIfTI volume and how far apart. min_foreground:
    smallest share of a slice above the volume's background for it to be taken. burned_in: take DICOM files whose header
    says that text is burnt into the pixels. patient: regular expression that finds the patient in a file's path below
    the source (its first group, or all of it), for instance "(Sub_[0-9]+)"; empty: the header's patient (DICOM), or the
    name that is left of the path without words for sequences and visits (NIfTI).
    """

    window: tuple[float, ...] = ()
    frames: str = "middle"
    plane: str = "axial"
    every_mm: float = 10.0
    min_foreground: float = 0.1
    burned_in: bool = False
    patient: str = ""

    def __post_init__(self) -> None:
        if self.window and (len(self.window) != 2 or self.window[1] <= 0):
            raise ScanError(f"scan.window is [centre, width] with a width above 0, got {list(self.window)}")
        if self.frames not in FRAMES:
            raise ScanError(f"scan.frames={self.frames!r} is not one of {', '.join(FRAMES)}")
        if self.plane not in PLANES:
            raise ScanError(f"scan.plane={self.plane!r} is not one of {', '.join(PLANES)}")
        if self.every_mm <= 0:
            raise ScanError(f"scan.every_mm={self.every_mm} must be above 0")
        try:
            re.compile(self.patient)
        except re.error as error:
            raise ScanError(f"scan.patient={self.patient!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class ScanPicture:
    """place: within the file ("", ":frame 3"). fields: columns that a row may draw on. facts: the row's meta."""

    place: str
    png: bytes
    fields: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def scan_kind(file: Path) -> str:
    """ "nifti", "dicom", or "" for another file: by name, else by its first bytes."""
    name = file.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith((".dcm", ".dicom")):
        return "dicom"
    if name == "dicomdir" or name.startswith(".") or name.endswith(PICTURES):
        return ""
    return "dicom" if begins_as_dicom(file) else ""


def begins_as_dicom(file: Path) -> bool:
    """The DICM mark, or (files written without one) a data element of group 2 or 8, the groups that come first."""
    try:
        with file.open("rb") as data:
            start = data.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or (
        start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x08\x00\x16\x00", b"\x02\x00\x00\x00")
    )


def scan_files(path: Path, kind: str) -> Iterable[Path]:
    """DICOM or NIfTI files under a path, sorted."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and scan_kind(file) == kind:
            yield file


def pseudonym(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8, key=pseudonym_key()).hexdigest()


def pseudonym_key() -> bytes:
    return os.environ.get(PSEUDONYM_KEY_ENV, "").encode()[:64]


def patient_by_pattern(place: str, options: ScanOptions) -> str:
    """Who stands in a file's path, by `scan.patient`. Raises ScanError where it finds nobody."""
    found = re.search(options.patient, place)
    if found is None:
        raise ScanError(f"{place}: scan.patient={options.patient!r} finds nothing in this path", "no_patient")
    return (found[1] if found.re.groups else found[0]) or found[0]


def windowed(file: Path, window: tuple[float, ...]) -> bytes | None:
    """A picture of over 8 bits a channel as PNG of 8 bits; None where it has no more, or no window is given."""
    if not window:
        return None
    try:
        with opened_file(file) as picture:
            if not picture.mode.startswith(("I", "F")):
                return None
            values = np.asarray(picture, dtype=np.float64)
    except UnreadablePicture:
        return None  # the steps that decode pictures say so with their reason
    centre, width = window
    return encoded(scaled(values, centre - width / 2, centre + width / 2))


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def upright_slice(
    values: np.ndarray,
    axis: int,
    index: int,
    window: tuple[float, float],
    spacing: Sequence[float],
    slope: float = 1.0,
    intercept: float = 0.0,
) -> np.ndarray:
    """Grey slice of a volume, rows running down and the patient's left on the right, with square pixels.

    values: to the right, front and top; `slope * value + intercept` is in the units of `window`, from black to white.
    spacing: of the three axes, mm.
    """
    low, high = window
    section = np.take(values, index, axis=axis).astype(np.float64) * slope + intercept
    grey = scaled(np.nan_to_num(section.T[::-1, ::-1], nan=low, posinf=high, neginf=low), low, high)
    columns, rows = (n for n in range(3) if n != axis)
    return square(grey, spacing[rows], spacing[columns])


def square(pixels: np.ndarray, row_mm: float, column_mm: float) -> np.ndarray:
    """The picture with square pixels of the smaller spacing. Raises ScanError as `square_size` does."""
    rows, columns = pixels.shape[:2]
    size = square_size(columns, rows, row_mm, column_mm)
    if size == (columns, rows):
        return pixels
    import cv2

    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def square_size(columns: int, rows: int, row_mm: float, column_mm: float) -> tuple[int, int]:
    """Width and height that `square` makes. Raises ScanError where one side of a pixel is many times the other."""
    if not row_mm or abs(row_mm / column_mm - 1) < 0.01:
        return columns, rows
    step = min(row_mm, column_mm)
    if not max(row_mm, column_mm) < MOST_STRETCHED * step:
        raise ScanError(f"pixels of {row_mm:g} x {column_mm:g} mm, which no scanner makes")
    return round(columns * column_mm / step), round(rows * row_mm / step)


def encoded(pixels: np.ndarray) -> bytes:
    """PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()

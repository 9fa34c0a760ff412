"""A scan's file as pictures, whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lingshu_rl.apart import in_a_line
from lingshu_rl.imaging.dicom import read_dicom
from lingshu_rl.imaging.nifti import read_nifti
from lingshu_rl.imaging.pixels import ScanError, ScanOptions, ScanPicture, scan_kind


def read_scan(file: Path, options: ScanOptions, place: str = "") -> Iterator[ScanPicture]:
    """place: the file's path below its source, of which ids are made; its name by default.

    Raises ScanError, whatever is wrong with the file: nothing of what it claims is reserved before it is known to be
    there.
    """
    read = read_nifti if scan_kind(file) == "nifti" else read_dicom
    try:
        yield from read(file, options, place or file.name)
    except ScanError:
        raise
    except Exception as error:  # damage shows as errors of pydicom, nibabel, a decoder, zlib, numpy or Python itself
        raise ScanError(f"{file}: cannot be read: {in_a_line(error)}") from error

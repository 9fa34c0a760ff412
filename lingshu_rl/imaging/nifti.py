"""NIfTI volumes as slices, patient-left on the right and upright, as radiologists look at them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lingshu_rl.imaging.pixels import (
    PLANES,
    ScanError,
    ScanOptions,
    ScanPicture,
    encoded,
    patient_by_pattern,
    pseudonym,
    upright_slice,
)

DEFLATE = 1032  # times that a packed file can be larger than it lies there: the format's own limit
MOST_VOXELS = 1 << 30  # of a volume: 4 GB as it is computed with
LEAST_MM, MOST_MM = 1e-5, 1e4  # a voxel's side
# Words of file and folder names that say which sequence, visit or part it is, not whose.
_SAME_PATIENT = """
t1 t1w t1c t1ce t1gd t1n t1km t2 t2w t2f t2star t2flair flair dwi adc swi pd pdw asl bold cbf cbv mra mrv mri mr ct
cta cect pet suv fdg us seg mask label labels segmentation image images imaging img imagestr imagests labelstr
labelsts volume vol scan anat func fmap perf pre post contrast arterial venous portal delayed nc axial coronal
sagittal baseline followup nii brain bet n4 mni space reg orig raw data train test val training validation left right
"""
SAME_PATIENT = frozenset(_SAME_PATIENT.split())
_VISIT = re.compile(r"(?:ses|session|visit|scan|run|acq|rec|echo|series|time|tp|week|month|year|day)\d*")
_CHANNEL = re.compile(r"0{3}\d")  # how nnU-Net numbers sequences, after the case's own number
_BIDS = re.compile(r"(?:^|[/_])(sub-[0-9A-Za-z]+)")


def patient_of(place: str) -> str:
    """Whose volume it is, by its path below the source: the BIDS subject; else the nearest name, from the file upwards,
    that says more than a sequence or a visit ("CASE_7/ct.nii.gz", "Sub_001_t1.nii.gz", "CASE_7/ses-2/t1.nii.gz").
    """
    if bids := _BIDS.search(place):
        return bids[1]
    parts = PurePosixPath(place.split(".nii")[0]).parts
    for part in reversed(parts):
        words = [word for word in re.split(r"[\W_]+", part) if word]
        telling = [word for n, word in enumerate(words) if not _tells_nothing(word, words[:n])]
        if telling:
            return "_".join(telling)
    return place


def _tells_nothing(word: str, before: list[str]) -> bool:
    """Whether a word of a name, after these, says which sequence, visit or part it is."""
    of_visit = word.isdigit() and bool(before) and bool(_VISIT.fullmatch(before[-1].lower()))
    channel = bool(_CHANNEL.fullmatch(word)) and any(other[-1].isdigit() for other in before)
    return of_visit or channel or word.lower() in SAME_PATIENT or bool(_VISIT.fullmatch(word.lower()))


def _upright(file: Path) -> tuple[np.ndarray, list[float]]:
    """The first volume of a file, its axes to the right, front and top, and the voxels' sides in mm."""
    import nibabel

    volume = nibabel.load(file)
    if not isinstance(volume, nibabel.Nifti1Image):  # NIfTI-2 is one too
        raise ScanError(f"{file}: is no NIfTI file but a {type(volume).__name__}")
    if len(volume.shape) not in (3, 4):
        raise ScanError(f"{file}: has {len(volume.shape)} dimensions, a volume has 3", "no_pixels")
    check_size(file, volume)
    values = np.asarray(volume.dataobj[..., 0] if len(volume.shape) == 4 else volume.dataobj, dtype=np.float32)
    orientation = nibabel.io_orientation(volume.affine)
    sides = dict(zip(orientation[:, 0], nibabel.affines.voxel_sizes(volume.affine), strict=True))
    spacing = [float(sides[axis]) for axis in range(3)]
    if not all(LEAST_MM < side < MOST_MM for side in spacing):
        raise ScanError(
            f"{file}: its voxels are {' x '.join(f'{side:g}' for side in spacing)} mm, which no scanner makes"
        )
    return nibabel.apply_orientation(values, orientation), spacing


def check_size(file: Path, volume: Any) -> None:
    """Raises ScanError for a file that cannot hold what its header says, or says more than one picture is worth."""
    voxels, held = math.prod(volume.shape), file.stat().st_size
    size = voxels * volume.get_data_dtype().itemsize
    if size > held * (DEFLATE if file.suffix == ".gz" else 1):
        raise ScanError(
            f"{file}: says that it has {' x '.join(map(str, volume.shape))} voxels, {size:,} bytes, in {held:,}"
        )
    if math.prod(volume.shape[:3]) > MOST_VOXELS:
        raise ScanError(f"{file}: a volume of over {MOST_VOXELS:,} voxels; cut it into parts or make them larger")


def read_nifti(file: Path, options: ScanOptions, place: str) -> Iterator[ScanPicture]:
    values, spacing = _upright(file)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0, 0)
    if options.window:
        low, high = options.window[0] - options.window[1] / 2, options.window[0] + options.window[1] / 2
    background = low + 0.1 * (high - low)
    axis = PLANES.index(options.plane)
    step = max(1, round(options.every_mm / spacing[axis]))
    patient = patient_by_pattern(place, options) if options.patient else patient_of(place)
    name = pseudonym(place)
    mm = round(min(side for n, side in enumerate(spacing) if n != axis), 5)
    taken = 0
    for index in range(step // 2, values.shape[axis], step):
        section = np.nan_to_num(np.take(values, index, axis=axis), nan=low)
        if (section > background).mean() < options.min_foreground:
            continue
        picture = encoded(upright_slice(values, axis, index, (low, high), spacing))
        facts = {"patient_id": pseudonym(patient), "plane": options.plane, "position": index, "mm_per_pixel": mm}
        taken += 1
        yield ScanPicture(f":slice {index}", picture, {"id": f"{name}-{options.plane}-{index}"}, facts)
    if not taken:
        raise ScanError(f"{file}: no slice has {options.min_foreground:.0%} of tissue", "empty_scan")

"""DICOM files and NIfTI volumes as 8-bit pictures with spacing, without the patient.

Grey values pass the modality's scale, then a window (given, the file's own, or percentiles). Pixels become square. Text comes
from a short list of header fields only, with the patient's name, numbers and dates taken out; the patient id is a keyed hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.curate.scrub import scrub

PSEUDONYM_KEY_ENV = "LINGSHU_RL_PSEUDONYM_KEY"  # secret of the keyed hashes; set it where ids must not be guessable
PLANES = ("sagittal", "coronal", "axial")  # NIfTI axes in RAS+ order
FRAMES = ("middle", "first", "all")
# DICOM attributes that may become text of a row; everything else stays in the file.
TEXT_ATTRIBUTES = ("Modality", "BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality", "StudyDescription",
                   "SeriesDescription", "ProtocolName", "ContrastBolusAgent", "PatientSex", "ImageComments")  # fmt: skip
MODALITIES = {"CR": "X-ray", "DX": "X-ray", "RG": "X-ray", "XA": "X-ray angiography", "RF": "fluoroscopy", "CT": "CT", "MR": "MRI",
              "US": "ultrasound", "IVUS": "ultrasound", "MG": "mammography", "NM": "nuclear medicine", "PT": "PET", "OP": "fundus",
              "OPT": "OCT", "ES": "endoscopy", "SM": "histopathology", "GM": "microscopy", "XC": "photograph"}  # fmt: skip


class ScanError(ValueError):
    """A scan that gives no picture. reason: the code of the side file."""

    def __init__(self, message: str, reason: str = "unreadable_scan") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ScanOptions:
    """window: (centre, width) in the modality's units (Hounsfield for CT); empty: the file's own, else percentiles.

    frames: of a multi-frame DICOM. plane, every_mm: which slices of a NIfTI volume and how far apart. min_foreground:
    smallest share of a slice above the volume's background for it to be taken. burned_in: take DICOM files whose header
    says that text is burnt into the pixels.
    """

    window: tuple[float, ...] = ()
    frames: str = "middle"
    plane: str = "axial"
    every_mm: float = 10.0
    min_foreground: float = 0.1
    burned_in: bool = False

    def __post_init__(self) -> None:
        if self.window and (len(self.window) != 2 or self.window[1] <= 0):
            raise ScanError(f"scan.window is [centre, width] with a width above 0, got {list(self.window)}")
        if self.frames not in FRAMES:
            raise ScanError(f"scan.frames={self.frames!r} is not one of {', '.join(FRAMES)}")
        if self.plane not in PLANES:
            raise ScanError(f"scan.plane={self.plane!r} is not one of {', '.join(PLANES)}")
        if self.every_mm <= 0:
            raise ScanError(f"scan.every_mm={self.every_mm} must be above 0")


@dataclass(frozen=True)
class Picture:
    """place: within the file ("", ":frame 3"). fields: columns that a row may draw on. facts: the row's meta."""

    place: str
    png: bytes
    fields: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def is_scan(name: str) -> bool:
    return name.lower().endswith((".dcm", ".dicom", ".nii", ".nii.gz"))


def scan_files(path: Path, kind: str) -> Iterable[Path]:
    """DICOM (by name or by the DICM mark) or NIfTI files under a path, sorted."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.name == "DICOMDIR":
            continue
        name = file.name.lower()
        wanted = name.endswith((".nii", ".nii.gz")) if kind == "nifti" else name.endswith((".dcm", ".dicom"))
        if wanted or (kind == "dicom" and not file.suffix and _has_mark(file)):
            yield file


def read_scan(file: Path, options: ScanOptions) -> Iterator[Picture]:
    """Raises ScanError."""
    if ".nii" in file.name.lower():
        return read_nifti(file, options)
    return read_dicom(file, options)


def pseudonym(text: str) -> str:
    key = os.environ.get(PSEUDONYM_KEY_ENV, "").encode()[:64]
    return hashlib.blake2b(text.encode(), digest_size=8, key=key).hexdigest()


# --- DICOM ------------------------------------------------------------------------------------------------------------


def read_dicom(file: Path, options: ScanOptions) -> Iterator[Picture]:
    import pydicom
    from pydicom.pixels import iter_pixels

    try:
        data = pydicom.dcmread(file)
    except Exception as error:  # pydicom raises whatever a broken header leads to
        raise ScanError(f"{file}: not a readable DICOM file: {type(error).__name__}: {error}") from error
    if "PixelData" not in data:
        raise ScanError(f"{file}: holds no picture ({data.get('Modality', 'no modality')})", "no_pixels")
    if data.get("Modality") in ("SEG", "RTDOSE", "RTSTRUCT"):
        raise ScanError(f"{file}: a {data.Modality} object is no picture of a patient", "no_pixels")
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES" and not options.burned_in:
        raise ScanError(f"{file}: its header says that text is burnt into the pixels", "burned_in_text")
    count = int(data.get("NumberOfFrames", 1) or 1)
    chosen = {"first": [0], "middle": [count // 2], "all": list(range(count))}[options.frames]
    fields, facts = dicom_facts(data)
    try:
        for number, pixels in zip(chosen, iter_pixels(data, indices=chosen), strict=True):
            place = "" if count == 1 else f":frame {number}"
            png = _png(_square(_eight_bits(data, pixels, options.window), *_spacing(data)))
            yield Picture(place, png, {**fields, "id": f"{fields['id']}{place.replace(':frame ', '-')}"}, facts)
    except ScanError:
        raise
    except Exception as error:  # decoders and look-up tables raise their own kinds
        raise ScanError(f"{file}: pixels cannot be decoded: {type(error).__name__}: {error}") from error


def dicom_facts(data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(columns, meta) of a header, without anything that names the patient, staff, place or day."""
    secrets = _secrets(data)
    fields: dict[str, Any] = {"id": pseudonym(str(data.get("SOPInstanceUID", "")) or repr(sorted(secrets)))}
    for name in TEXT_ATTRIBUTES:
        if text := str(data.get(name, "") or "").strip():
            fields[name] = scrub(text, secrets)
    facts: dict[str, Any] = {}
    if patient := str(data.get("PatientID", "") or ""):
        facts["patient_id"] = pseudonym(patient)
    if study := str(data.get("StudyInstanceUID", "") or ""):
        facts["study_id"] = pseudonym(study)
    if modality := str(data.get("Modality", "") or ""):
        facts["modality"] = MODALITIES.get(modality, modality)
    if part := fields.get("BodyPartExamined"):
        facts["organ"] = part.lower()
    rows, _ = _spacing(data)
    if rows:
        facts["mm_per_pixel"] = round(min(_spacing(data)), 5)
    return fields, facts


def _spacing(data: Any) -> tuple[float, float]:
    """Millimetres between rows and between columns; (0, 0) when unknown. Projection films give the detector's."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = data.get(name)
        if value and len(value) == 2 and float(value[0]) > 0 and float(value[1]) > 0:
            return float(value[0]), float(value[1])
    return 0.0, 0.0


def _eight_bits(data: Any, pixels: np.ndarray, window: tuple[float, ...]) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = str(data.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        coloured = apply_color_lut(pixels, data)
        return (coloured >> (8 * (coloured.dtype.itemsize - 1))).astype(np.uint8)
    if pixels.ndim == 3:
        if pixels.dtype == np.uint8:
            return pixels
        return _scaled(pixels.astype(np.float64), 0, float(2 ** int(data.BitsStored) - 1))
    values = apply_modality_lut(pixels, data)
    if window:
        centre, width = window
        grey = _scaled(values.astype(np.float64), centre - width / 2, centre + width / 2)
    elif "WindowCenter" in data or "VOILUTSequence" in data:
        seen = apply_voi_lut(values, data)
        grey = _scaled(seen.astype(np.float64), *_voi_range(data, seen))
    elif pixels.dtype == np.uint8 and int(data.get("BitsStored", 8)) == 8:
        grey = pixels
    else:
        low, high = np.percentile(values, (0.5, 99.5))
        grey = _scaled(values.astype(np.float64), low, high)
    return 255 - grey if kind == "MONOCHROME1" else grey


def _voi_range(data: Any, seen: np.ndarray) -> tuple[float, float]:
    """The range that apply_voi_lut stretches its window to: the modality's whole output range, or the table's."""
    if "VOILUTSequence" in data:
        return 0.0, float(2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    bits, signed = int(data.BitsStored), int(data.get("PixelRepresentation", 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    if "ModalityLUTSequence" in data:
        return float(seen.min()), float(seen.max())
    return low * slope + intercept, high * slope + intercept


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _square(pixels: np.ndarray, row_mm: float, column_mm: float) -> np.ndarray:
    """The picture with square pixels of the smaller spacing."""
    if not row_mm or abs(row_mm / column_mm - 1) < 0.01:
        return pixels
    import cv2

    step = min(row_mm, column_mm)
    height, width = round(pixels.shape[0] * row_mm / step), round(pixels.shape[1] * column_mm / step)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def _has_mark(file: Path) -> bool:
    with file.open("rb") as data:
        return data.read(132)[128:] == b"DICM"


# --- text -------------------------------------------------------------------------------------------------------------


def _secrets(data: Any) -> set[str]:
    """Words of the header that name a person, a place, a number or a day."""
    found: set[str] = set()
    for element in data.iterall():
        if element.VR in ("PN", "DA", "DT") or element.keyword in (
            "PatientID", "AccessionNumber", "StudyID", "OtherPatientIDs", "InstitutionName", "InstitutionAddress", "StationName",
            "PatientAddress", "PatientTelephoneNumbers", "DeviceSerialNumber",
        ):  # fmt: skip
            text = str(element.value or "")
            pieces = re.split(r"[\^\s,=\\]+", text) if element.VR == "PN" else [text.strip()]
            found.update(piece for piece in pieces if len(piece) > 2)
    return found


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def read_nifti(file: Path, options: ScanOptions) -> Iterator[Picture]:
    """Slices of one plane, patient-left on the right and upright, as radiologists look at them."""
    import nibabel

    try:
        volume = nibabel.as_closest_canonical(nibabel.load(file))
        values = np.asanyarray(volume.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises its own, zlib's and numpy's errors
        raise ScanError(f"{file}: not a readable NIfTI file: {type(error).__name__}: {error}") from error
    if values.ndim == 4:
        values = values[..., 0]
    if values.ndim != 3:
        raise ScanError(f"{file}: has {values.ndim} dimensions, a volume has 3", "no_pixels")
    spacing = [float(x) for x in volume.header.get_zooms()[:3]]
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0, 0)
    if options.window:
        low, high = options.window[0] - options.window[1] / 2, options.window[0] + options.window[1] / 2
    background = low + 0.1 * (high - low)
    axis = PLANES.index(options.plane)
    step = max(1, round(options.every_mm / spacing[axis]))
    name = file.name.split(".nii")[0]
    row_axis, column_axis = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
    taken = 0
    for index in range(step // 2, values.shape[axis], step):
        section = np.nan_to_num(np.take(values, index, axis=axis), nan=low)
        if (section > background).mean() < options.min_foreground:
            continue
        # canonical axes run to the right, front and top: rows must run down, and the patient's left stand on the right
        picture = section.T[::-1, ::-1]
        grey = _scaled(picture.astype(np.float64), low, high)
        square = _square(grey, spacing[row_axis], spacing[column_axis])
        facts = {"patient_id": pseudonym(name), "plane": options.plane, "position": index,
                 "mm_per_pixel": round(min(spacing[row_axis], spacing[column_axis]), 5)}  # fmt: skip
        taken += 1
        yield Picture(f":slice {index}", _png(square), {"id": f"{name}-{options.plane}-{index}"}, facts)
    if not taken:
        raise ScanError(f"{file}: no slice has {options.min_foreground:.0%} of tissue", "empty_scan")

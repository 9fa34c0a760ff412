"""DICOM files as pictures: what the header says of grey values, spacing and patient, frame by frame."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np

from lingshu_rl.imaging.decoding import DECODER
from lingshu_rl.imaging.pixels import (
    ScanError,
    ScanOptions,
    ScanPicture,
    begins_as_dicom,
    encoded,
    patient_by_pattern,
    pseudonym,
    scaled,
    square,
)
from lingshu_rl.text.scrub import scrub

# Attributes that may become text of a row; everything else stays in the file.
TEXT_ATTRIBUTES = tuple(
    "Modality BodyPartExamined ViewPosition Laterality ImageLaterality StudyDescription SeriesDescription "
    "ProtocolName ContrastBolusAgent PatientSex ImageComments".split()
)
MODALITIES = {
    "CR": "X-ray",
    "DX": "X-ray",
    "RG": "X-ray",
    "XA": "X-ray angiography",
    "RF": "fluoroscopy",
    "CT": "CT",
    "MR": "MRI",
    "US": "ultrasound",
    "IVUS": "ultrasound",
    "MG": "mammography",
    "NM": "nuclear medicine",
    "PT": "PET",
    "OP": "fundus",
    "OPT": "OCT",
    "ES": "endoscopy",
    "SM": "histopathology",
    "GM": "microscopy",
    "XC": "photograph",
}
# Functional groups of enhanced files whose attributes stand at the top of older ones.
GREY_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")
# Of a frame of more bytes one in RATIO must be in the file; only what is empty or flat is compressed further.
SMALL_FRAME, RATIO = 16 << 20, 200
# JPEG's markers: frame headers (all of C0 to CF but those of tables, and that of JPEG-LS), and the start of the pixels.
SIZED, SCAN = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}), 0xDA
CODE = re.compile(r"[A-Z0-9_ ]{1,16}")  # a code string of DICOM
CENTIMETRES, TISSUE = 3, 1  # an ultrasound region's unit, and its spatial format "2D"


def read_dicom(file: Path, options: ScanOptions, place: str) -> Iterator[ScanPicture]:
    data = read_header(file)
    _check(file, data, options)
    count = frames_of(file, data)
    chosen = {"first": range(1), "middle": range(count // 2, count // 2 + 1), "all": range(count)}[options.frames]
    fields, facts = dicom_facts(data)
    if options.patient:
        facts["patient_id"] = pseudonym(patient_by_pattern(place, options))
    for number in chosen:
        pixels = stored_pixels(file, data, number, data)
        frame = frame_header(data, number)
        rows_mm, columns_mm = spacing(frame)
        size = {"mm_per_pixel": round(min(rows_mm, columns_mm), 5)} if rows_mm else {}
        png = encoded(square(_eight_bits(frame, pixels, options.window), rows_mm, columns_mm))
        name = fields["id"] if count == 1 else f"{fields['id']}-{number}"
        yield ScanPicture("" if count == 1 else f":frame {number}", png, {**fields, "id": name}, {**facts, **size})


def read_header(file: Path) -> Any:
    """The file's elements; its pixels as they are stored."""
    import pydicom

    held = io.BytesIO(file.read_bytes())  # of a file, pydicom asks for as many bytes as an element claims to have
    data = pydicom.dcmread(held, force=begins_as_dicom(file))
    _name_syntax(data)
    return data


def stored_pixels(file: Path, header: Any, number: int, data: Any = None) -> np.ndarray:
    """One frame as the file holds it, colours as RGB. data: the file with its pixels, where it was read whole.

    Raises ScanError where it is compressed and cannot be decoded.
    """
    from pydicom.pixels import pixel_array

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_encapsulated:
        return DECODER.frame(file, number)
    return pixel_array(file if data is None else data, index=number)


def frames_of(file: Path, data: Any) -> int:
    """How many frames there are. Raises ScanError where the file cannot hold them, or not one of that size."""
    count = int(data.get("NumberOfFrames", 1) or 1)
    held = len(data.PixelData)
    if not 1 <= count <= held:
        raise ScanError(f"{file}: says that it has {count} frames, in {held} bytes of pixels")
    size = int(data.Rows) * int(data.Columns) * int(data.SamplesPerPixel) * int(data.BitsAllocated) // 8
    if size > max(SMALL_FRAME, held * RATIO):
        raise ScanError(
            f"{file}: says that a frame has {data.Rows} x {data.Columns} pixels, {size >> 20:,} MB, in {held} bytes"
        )
    _check_streams(file, data, count)
    return count


def _check_streams(file: Path, data: Any, count: int) -> None:
    """Raises ScanError for a compressed frame of another size than the header's: decoders reserve what it says."""
    from pydicom.encaps import generate_frames

    if not data.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    header = (int(data.Rows), int(data.Columns), int(data.SamplesPerPixel))
    for number, frame in enumerate(generate_frames(data.PixelData, number_of_frames=count)):
        for told in stream_sizes(frame):
            if told != header:
                raise ScanError(
                    f"{file}: frame {number} is compressed as {told}, its header says {header} (rows, columns, samples)"
                )


def stream_sizes(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, samples) that JPEG, JPEG-LS and JPEG 2000 streams say of themselves; nothing for others (RLE).

    Source: the frame header SOF of ISO/IEC 10918-1 and 14495-1, the SIZ segment of ISO/IEC 15444-1.
    """
    for found in re.finditer(rb"\xff\x4f\xff\x51", frame):  # a JP2 file may hold boxes before its stream
        right, bottom, left, top = unpack_from(">4I", frame, found.end() + 4)
        yield bottom - top, right - left, unpack_from(">H", frame, found.end() + 36)[0]
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 10 <= len(frame):
        if frame[at : at + 1] != b"\xff" or frame[at + 1] == 0xFF:  # fill bytes before a marker
            at += 1
            continue
        marker, length = unpack_from(">BH", frame, at + 1)
        if marker in SIZED:
            yield unpack_from(">HHB", frame, at + 5)
        if marker == SCAN:
            return
        at += 2 + length


def _name_syntax(data: Any) -> None:
    """Files without a meta header do not say how their pixels are written: as the elements before them."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    data.ensure_file_meta()
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _check(file: Path, data: Any, options: ScanOptions) -> None:
    """Raises ScanError for a file that is no picture, or none that may or can be read."""
    if "PixelData" not in data:
        raise ScanError(f"{file}: holds no picture ({_modality(data) or 'no modality'})", "no_pixels")
    if data.get("Modality") in ("SEG", "RTDOSE", "RTSTRUCT"):
        raise ScanError(f"{file}: a {data.Modality} object is no picture of a patient", "no_pixels")
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES" and not options.burned_in:
        raise ScanError(f"{file}: its header says that text is burnt into the pixels", "burned_in_text")
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not _decodable(syntax):
        raise ScanError(
            f"{file}: compressed as {syntax.name}, which no installed decoder reads: pip install 'lingshu-rl[dicom]'",
            "missing_codec",
        )


def _modality(data: Any) -> str:
    """Its code, or "": in a damaged file the value may be all that follows."""
    modality = str(data.get("Modality", "") or "").strip()
    return modality if CODE.fullmatch(modality) else ""


def _decodable(syntax: Any) -> bool:
    from pydicom.pixels import get_decoder

    if syntax.is_deflated:  # the whole file is, and was unpacked with its header
        return True
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:  # a compression that pydicom does not know
        return False


def frame_header(data: Any, number: int) -> Any:
    """What the header says of one frame: its own functional groups before those of all frames, before the top level."""
    shared, own = data.get("SharedFunctionalGroupsSequence"), data.get("PerFrameFunctionalGroupsSequence")
    if not shared and not own:
        return data
    from pydicom.dataset import Dataset

    header = Dataset()
    header.file_meta = data.file_meta  # look-up tables ask for the byte order
    header.update(
        {e.tag: e for e in data if e.keyword != "PixelData" and not e.keyword.endswith("FunctionalGroupsSequence")}
    )
    for groups in (shared[0] if shared else None, own[number] if own and number < len(own) else None):
        for name in GREY_GROUPS:
            for entry in (groups.get(name) or ()) if groups is not None else ():
                header.update({element.tag: element for element in entry})
    return header


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
    if modality := _modality(data):
        facts["modality"] = MODALITIES.get(modality, modality)
    if part := fields.get("BodyPartExamined"):
        facts["organ"] = part.lower()
    return fields, facts


def spacing(header: Any) -> tuple[float, float]:
    """Millimetres between rows and between columns; (0, 0) when unknown. Projection films give the detector's."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = header.get(name)
        if value and len(value) == 2 and float(value[0]) > 0 and float(value[1]) > 0:
            return float(value[0]), float(value[1])
    return _ultrasound_spacing(header.get("SequenceOfUltrasoundRegions") or ())


def _ultrasound_spacing(regions: Any) -> tuple[float, float]:
    """Of the tissue regions, if they agree; traces (Doppler, M-mode) measure something else."""
    found = {
        (10 * abs(float(r.PhysicalDeltaY)), 10 * abs(float(r.PhysicalDeltaX)))
        for r in regions
        if r.get("PhysicalUnitsXDirection") == r.get("PhysicalUnitsYDirection") == CENTIMETRES
        and r.get("RegionSpatialFormat", TISSUE) == TISSUE
    }
    rows_mm, columns_mm = found.pop() if len(found) == 1 else (0.0, 0.0)
    return (rows_mm, columns_mm) if rows_mm > 0 and columns_mm > 0 else (0.0, 0.0)


def _eight_bits(header: Any, pixels: np.ndarray, window: tuple[float, ...]) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    kind = str(header.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        coloured = apply_color_lut(pixels, header)
        return (coloured >> (8 * (coloured.dtype.itemsize - 1))).astype(np.uint8)
    if pixels.ndim == 3:
        if pixels.dtype == np.uint8:
            return pixels
        return scaled(pixels.astype(np.float64), 0, float(2 ** int(header.BitsStored) - 1))
    padding = _padding(header, pixels)
    grey = _grey(header, pixels, window, padding)
    if kind == "MONOCHROME1":
        grey = 255 - grey
    return np.where(padding, np.uint8(0), grey) if padding.any() else grey


def _padding(header: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels that were never measured: what stands outside a round field of view."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(pixels.shape, bool)
    last = header.get("PixelPaddingRangeLimit", first)
    # Files of signed pixels write it unsigned now and then: 63536 for -2000.
    low, high = sorted(int(np.array(int(value)).astype(pixels.dtype)) for value in (first, last))
    return (pixels >= low) & (pixels <= high)


def _grey(header: Any, pixels: np.ndarray, window: tuple[float, ...], padding: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(pixels, header)
    if window:
        centre, width = window
        return scaled(values.astype(np.float64), centre - width / 2, centre + width / 2)
    if tables := header.get("VOILUTSequence"):
        return _looked_up(tables[0], values, header.file_meta.TransferSyntaxUID.is_little_endian)
    if _has_window(header):
        seen = apply_voi_lut(values, header, prefer_lut=False)
        return scaled(seen.astype(np.float64), *_window_range(header, seen))
    if pixels.dtype == np.uint8 and int(header.get("BitsStored", 8)) == 8:
        return pixels
    measured = values if padding.all() else values[~padding]
    low, high = np.percentile(measured, (0.5, 99.5))
    return scaled(values.astype(np.float64), low, high)


def _looked_up(table: Any, values: np.ndarray, little_endian: bool) -> np.ndarray:
    """Grey values by a VOI table. pydicom's own look-up wraps round where 8-bit entries are more than 256."""
    count, first, bits = table.LUTDescriptor
    order = "<u2" if little_endian else ">u2"
    entries = np.frombuffer(table.LUTData, order) if isinstance(table.LUTData, bytes) else np.asarray(table.LUTData)
    places = np.clip(values.astype(np.int64) - int(first), 0, min(count or 2**16, len(entries)) - 1)
    return scaled(entries[places].astype(np.float64), 0.0, float(2**bits - 1))


def _has_window(header: Any) -> bool:
    return None not in (_first(header, "WindowCenter"), _first(header, "WindowWidth"))


def _first(header: Any, name: str) -> float | None:
    value = header.get(name)
    if value is None or str(value).strip() == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _window_range(header: Any, seen: np.ndarray) -> tuple[float, float]:
    """The range that apply_voi_lut stretches a window to: the modality's whole output range."""
    if "ModalityLUTSequence" in header:
        return float(seen.min()), float(seen.max())
    bits, signed = int(header.BitsStored), int(header.get("PixelRepresentation", 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def _secrets(data: Any) -> set[str]:
    """Words of the header that name a person, a place, a number or a day."""
    found: set[str] = set()
    for element in data.iterall():
        if element.VR in ("PN", "DA", "DT") or element.keyword in tuple(
            "PatientID AccessionNumber StudyID OtherPatientIDs InstitutionName InstitutionAddress StationName "
            "PatientAddress PatientTelephoneNumbers DeviceSerialNumber".split()
        ):
            text = str(element.value or "")
            pieces = re.split(r"[\^\s,=\\]+", text) if element.VR == "PN" else [text.strip()]
            found.update(piece for piece in pieces if len(piece) > 2)
    return found

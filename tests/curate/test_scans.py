"""DICOM and NIfTI: right grey values, square pixels, the right way up, and nothing of the patient."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lingshu_rl.curate.readers import Source, read_rows
from lingshu_rl.curate.scans import PSEUDONYM_KEY_ENV, ScanError, ScanOptions, pseudonym, read_scan, scan_files


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def dicom(path: Path, values: np.ndarray, **attributes: Any) -> Path:
    """A CT-like file with these stored values."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID, data.PatientName = "CT", "4711-A", "Miller^Anna^Maria"
    data.StudyDate, data.StudyDescription = "20210305", "Chest CT of Anna Miller 05.03.2021, Dr. Brown"
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    for name, value in attributes.items():
        setattr(data, name, value)
    data.PixelData = values.astype("<u2").tobytes()
    data.save_as(path)
    return path


RAMP = np.repeat(np.arange(0, 4096, 64, dtype=np.uint16)[None], 40, 0)  # stored values; Hounsfield = value - 1024


def test_a_given_window_maps_hounsfield_units_to_grey(tmp_path: Path) -> None:
    (picture,) = read_scan(dicom(tmp_path / "a.dcm", RAMP), ScanOptions(window=(40.0, 400.0)))
    hounsfield = RAMP[0].astype(float) - 1024
    expected = np.rint(np.clip((hounsfield + 160) / 400, 0, 1) * 255)
    assert np.array_equal(pixels(picture.png)[0], expected)


def test_the_files_own_window_is_used_and_percentiles_without_one(tmp_path: Path) -> None:
    (own,) = read_scan(dicom(tmp_path / "a.dcm", RAMP, WindowCenter=40, WindowWidth=400), ScanOptions())
    (given,) = read_scan(tmp_path / "a.dcm", ScanOptions(window=(40.0, 400.0)))
    assert np.abs(pixels(own.png).astype(int) - pixels(given.png)).max() <= 1
    (spread,) = read_scan(dicom(tmp_path / "b.dcm", RAMP), ScanOptions())
    assert pixels(spread.png).min() == 0 and pixels(spread.png).max() == 255


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    (picture,) = read_scan(dicom(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="MONOCHROME1"), ScanOptions())
    assert pixels(picture.png)[0, 0] == 255 and pixels(picture.png)[0, -1] == 0


def test_pixels_become_square_and_the_spacing_is_told(tmp_path: Path) -> None:
    (picture,) = read_scan(dicom(tmp_path / "a.dcm", RAMP, PixelSpacing=[1.0, 0.5]), ScanOptions())
    assert pixels(picture.png).shape == (80, 64)  # 40 rows of 1 mm, 64 columns of 0.5 mm
    assert picture.facts["mm_per_pixel"] == 0.5


def test_nothing_of_the_patient_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "a.dcm", RAMP, BodyPartExamined="CHEST", InstitutionName="Spital Nord")
    (picture,) = read_scan(path, ScanOptions())
    told = repr((picture.fields, picture.facts))
    for secret in ("4711", "Miller", "Anna", "2021", "Brown", "Spital"):
        assert secret not in told
    assert picture.fields["StudyDescription"].startswith("Chest CT of")
    assert (picture.facts["modality"], picture.facts["organ"]) == ("CT", "chest")
    assert not Image.open(io.BytesIO(picture.png)).info
    before = picture.facts["patient_id"]
    monkeypatch.setenv(PSEUDONYM_KEY_ENV, "secret")
    (again,) = read_scan(path, ScanOptions())
    assert again.facts["patient_id"] == pseudonym("4711-A") != before


def test_burnt_in_and_pictureless_files_are_refused_with_a_code(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", RAMP, BurnedInAnnotation="YES")
    with pytest.raises(ScanError) as error:
        list(read_scan(path, ScanOptions()))
    assert error.value.reason == "burned_in_text"
    assert list(read_scan(path, ScanOptions(burned_in=True)))
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(tmp_path / "b.dcm")
    (tmp_path / "c.dcm").write_bytes(b"no dicom")
    for name, reason in (("b.dcm", "no_pixels"), ("c.dcm", "unreadable_scan")):
        with pytest.raises(ScanError) as error:
            list(read_scan(tmp_path / name, ScanOptions()))
        assert error.value.reason == reason


def test_real_files_of_several_modalities_are_read() -> None:
    """CT, MR, colour ultrasound, palette colour, and a multi-frame file, as pydicom ships them."""
    for name, modality in (("CT_small.dcm", "CT"), ("MR_small.dcm", "MRI"), ("examples_ybr_color.dcm", "ultrasound"), ("examples_palette.dcm", "ultrasound")):  # fmt: skip
        path = get_testdata_file(name, download=False)
        if path is None:
            pytest.skip(f"pydicom's {name} is not here")
        (picture,) = read_scan(Path(path), ScanOptions())
        shown = pixels(picture.png)
        assert picture.facts["modality"] == modality and shown.std() > 10
        assert shown.ndim == (3 if "_" in name and "small" not in name else 2)
    many = get_testdata_file("examples_ybr_color.dcm", download=False)
    frames = list(read_scan(Path(many), ScanOptions(frames="all")))
    assert len(frames) == int(pydicom.dcmread(many, stop_before_pixels=True).NumberOfFrames)
    assert len({frame.fields["id"] for frame in frames}) == len(frames)


def test_a_dicom_folder_is_a_source_with_columns_from_the_header(tmp_path: Path) -> None:
    for i in range(3):
        dicom(tmp_path / f"{i}.dcm", RAMP + i, BodyPartExamined="CHEST")
    (tmp_path / "bad.dcm").write_bytes(b"no dicom")
    source = Source(str(tmp_path), fields={"answer": "BodyPartExamined"}, values={"question": "Which region is shown?"})
    records = list(read_rows(source))
    rows = [record.row for record in records if record.row]
    assert [record.reason for record in records if not record.row] == ["unreadable_scan"]
    assert [row["answer"] for row in rows] == ["CHEST"] * 3 and len({row["id"] for row in rows}) == 3
    assert all(row["meta"]["modality"] == "CT" and isinstance(row["images"][0], bytes) for row in rows)


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def volume(path: Path, flip: bool = False) -> Path:
    """2 x 1 x 3 mm voxels; a bright block at the patient's left, front and top."""
    values = np.full((20, 30, 16), 50, np.float32)
    values[2:7, 20:28, 10:15] = 200  # RAS: small x is the patient's left
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    if flip:  # the same patient, stored from the left ear on
        values, affine = values[::-1], np.array([[-2.0, 0, 0, 38], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    values = values + np.random.default_rng(0).uniform(0, 1, values.shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.mark.parametrize(("plane", "corner", "shape"), [("axial", "top right", (30, 40)), ("coronal", "top right", (24, 20)), ("sagittal", "top left", (48, 30))])  # fmt: skip
@pytest.mark.parametrize("flip", [False, True])
def test_slices_stand_upright_with_the_patients_left_on_the_right(tmp_path: Path, plane: str, corner: str, shape: tuple[int, int], flip: bool) -> None:  # fmt: skip
    options = ScanOptions(plane=plane, every_mm=0.5, min_foreground=0.0, window=(125.0, 150.0))
    pictures = list(read_scan(volume(tmp_path / "a.nii.gz", flip), options))
    bright = max((pixels(p.png) for p in pictures), key=lambda x: float(x.mean()))
    if plane != "sagittal":
        assert bright.shape == shape
    rows, columns = np.nonzero(bright > 128)
    vertical = "top" if rows.mean() < bright.shape[0] / 2 else "bottom"
    horizontal = "left" if columns.mean() < bright.shape[1] / 2 else "right"
    assert f"{vertical} {horizontal}" == corner
    assert pictures[0].facts["plane"] == plane and pictures[0].facts["mm_per_pixel"] in (1.0, 2.0)


def test_slices_are_taken_every_so_many_millimetres(tmp_path: Path) -> None:
    pictures = list(read_scan(volume(tmp_path / "a.nii"), ScanOptions(every_mm=9.0, min_foreground=0.0)))
    assert [p.facts["position"] for p in pictures] == [1, 4, 7, 10, 13]  # 3 mm voxels, 16 slices
    with pytest.raises(ScanError) as error:
        list(read_scan(tmp_path / "a.nii", ScanOptions(window=(5000.0, 10.0))))
    assert error.value.reason == "empty_scan"


def test_bad_options_are_refused() -> None:
    for bad in ({"plane": "oblique"}, {"frames": "second"}, {"window": (1.0,)}, {"every_mm": 0.0}):
        with pytest.raises(ScanError):
            ScanOptions(**bad)  # type: ignore[arg-type]


def test_files_are_found_by_name_or_mark(tmp_path: Path) -> None:
    dicom(tmp_path / "IM0001", RAMP)
    volume(tmp_path / "v.nii.gz")
    (tmp_path / "notes").write_text("x" * 200)
    assert [p.name for p in scan_files(tmp_path, "dicom")] == ["IM0001"]
    assert [p.name for p in scan_files(tmp_path, "nifti")] == ["v.nii.gz"]

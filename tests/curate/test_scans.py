"""DICOM and NIfTI: right grey values, square pixels, the right way up, and nothing of the patient."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from curate_helpers import jpeg, texture, write_rows
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lingshu_rl.curate.readers import Source, read_rows
from lingshu_rl.imaging.decoding import DECODER, Decoder
from lingshu_rl.imaging.dicom import stream_sizes
from lingshu_rl.imaging.nifti import patient_of
from lingshu_rl.imaging.pixels import PSEUDONYM_KEY_ENV, ScanError, ScanOptions, pseudonym, scan_files
from lingshu_rl.imaging.scans import read_scan


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
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    for name, value in attributes.items():
        setattr(data, name, value)
        if value is None:
            delattr(data, name)
    data.PixelData = values.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
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
    source = Source(str(tmp_path), map={"answer": "BodyPartExamined"}, values={"question": "Which region is shown?"})
    records = list(read_rows(source))
    rows = [record.row for record in records if record.row]
    assert [record.reason for record in records if not record.row] == ["unreadable_scan"]
    assert [row["answer"] for row in rows] == ["CHEST"] * 3 and len({row["id"] for row in rows}) == 3
    assert all(row["meta"]["modality"] == "CT" and isinstance(row["images"][0], bytes) for row in rows)


def test_files_are_known_by_their_first_bytes_whatever_their_names(tmp_path: Path) -> None:
    """As archives export them: numbers, UIDs and suffixes of their own; and one from before the DICM mark."""
    names = ["1.2.840.113619.2.55", "IM-0001-0007", "I1000000.IMA", "scan.v2", "old"]
    for name in names:
        dicom(tmp_path / "study" / name, RAMP)
    old = tmp_path / "study" / "old"
    old.write_bytes(old.read_bytes()[old.read_bytes().index(b"\x08\x00\x16\x00") :])
    (tmp_path / "study" / ".DS_Store").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "study" / "notes.txt").write_text("x" * 200)
    assert sorted(p.name for p in scan_files(tmp_path / "study", "dicom")) == sorted(names)
    rows = [{"id": n, "image": f"study/{n}", "question": "What is it?", "answer": "a ramp"} for n in names]
    records = list(read_rows(Source(str(write_rows(tmp_path / "rows.jsonl", rows)))))
    assert [r.reason for r in records] == [""] * 5 and len({r.row["images"][0] for r in records}) == 1
    assert list(read_rows(Source(str(tmp_path / "study" / "1.2.840.113619.2.55"))))  # a source of one such file


def group(**attributes: Any) -> Any:
    data = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


def test_an_enhanced_file_is_read_frame_by_frame(tmp_path: Path) -> None:
    """Scale and spacing stand in the groups of all frames, the window in each frame's own."""
    stack = np.stack([RAMP, RAMP, RAMP])
    scale = group(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    shared = group(PixelValueTransformationSequence=[scale], PixelMeasuresSequence=[group(PixelSpacing=[1.0, 0.5])])
    windows = [(40, 400), (-600, 1500), (300, 2000)]
    own = [group(FrameVOILUTSequence=[group(WindowCenter=c, WindowWidth=w)]) for c, w in windows]
    path = dicom(tmp_path / "e.dcm", stack, NumberOfFrames=3, SharedFunctionalGroupsSequence=[shared],
                 PerFrameFunctionalGroupsSequence=own, RescaleSlope=None, RescaleIntercept=None)  # fmt: skip
    frames = list(read_scan(path, ScanOptions(frames="all")))
    for number, (frame, (centre, width)) in enumerate(zip(frames, windows, strict=True)):
        plain = dicom(tmp_path / f"{number}.dcm", RAMP, WindowCenter=centre, WindowWidth=width, PixelSpacing=[1.0, 0.5])
        (expected,) = read_scan(plain, ScanOptions())
        assert np.array_equal(pixels(frame.png), pixels(expected.png))
        assert frame.facts["mm_per_pixel"] == 0.5
    (given,) = read_scan(path, ScanOptions(window=(40.0, 400.0)))
    assert np.abs(pixels(given.png).astype(int) - pixels(frames[0].png)).max() <= 1


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_is_black_and_does_not_move_the_percentiles(tmp_path: Path, kind: str) -> None:
    padded = RAMP.copy()
    padded[:, :20] = 4095  # a third of the picture was never measured
    (measured,) = read_scan(dicom(tmp_path / "a.dcm", RAMP[:, 20:], PhotometricInterpretation=kind), ScanOptions())
    path = dicom(tmp_path / "b.dcm", padded, PhotometricInterpretation=kind, PixelPaddingValue=4090, PixelPaddingRangeLimit=4095)  # fmt: skip
    (picture,) = read_scan(path, ScanOptions())
    assert pixels(picture.png)[:, :20].max() == 0
    assert np.array_equal(pixels(picture.png)[:, 20:], pixels(measured.png))


def test_padding_of_signed_pixels_may_be_written_unsigned(tmp_path: Path) -> None:
    signed = RAMP.astype(np.int16) - 1024
    signed[:, :20] = -2000
    path = dicom(
        tmp_path / "a.dcm", signed.view(np.uint16), PixelRepresentation=1, BitsStored=16, HighBit=15, RescaleIntercept=0
    )
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", "US", 63536)
    data.save_as(path)
    (picture,) = read_scan(path, ScanOptions())
    assert pixels(picture.png)[:, :20].max() == 0 and pixels(picture.png)[0, 21] < 20


def test_an_ultrasound_regions_spacing_is_used_where_the_tissue_regions_agree(tmp_path: Path) -> None:
    def region(delta: float, unit: int = 3, space: int = 1) -> Any:
        return group(PhysicalDeltaX=delta, PhysicalDeltaY=delta, PhysicalUnitsXDirection=unit, PhysicalUnitsYDirection=unit,
                     RegionSpatialFormat=space)  # fmt: skip

    def spacing_of(*regions: Any) -> float | None:
        path = dicom(tmp_path / "us.dcm", RAMP, Modality="US", SequenceOfUltrasoundRegions=list(regions))
        (picture,) = read_scan(path, ScanOptions())
        return picture.facts.get("mm_per_pixel")

    assert spacing_of(region(0.03)) == 0.3  # centimetres in the file
    assert spacing_of(region(0.03), region(0.5, unit=4, space=3)) == 0.3  # beside a Doppler trace, in seconds
    assert spacing_of(region(0.03), region(0.05)) is None
    assert spacing_of(region(0.5, unit=4)) is None


def test_a_look_up_table_of_8_bit_entries_is_followed_beyond_256(tmp_path: Path) -> None:
    entries = (np.linspace(0, 1, 4096) ** 2 * 255).astype("<u2")
    table = group(LUTDescriptor=[4096, 0, 8], LUTData=entries.tobytes())
    path = dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[table], RescaleSlope=None, RescaleIntercept=None)
    (picture,) = read_scan(path, ScanOptions())
    assert np.array_equal(pixels(picture.png)[0], entries[RAMP[0]])


def test_a_compression_without_a_decoder_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False)
    if path is None:
        pytest.skip("pydicom's JPEG-LS file is not here")
    monkeypatch.setattr("lingshu_rl.imaging.dicom._decodable", lambda syntax: False)
    with pytest.raises(ScanError, match=r"JPEG-LS Lossless.*lingshu-rl\[dicom\]") as error:
        list(read_scan(Path(path), ScanOptions()))
    assert error.value.reason == "missing_codec"


def test_jpeg_ls_and_lossless_jpeg_are_decoded_with_the_extra() -> None:
    pytest.importorskip("gdcm", reason="the extra [dicom] is not installed")
    plain = get_testdata_file("MR_small.dcm", download=False)
    for name in ("MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"):
        (picture,) = read_scan(Path(get_testdata_file(name, download=False)), ScanOptions())
        (expected,) = read_scan(Path(plain), ScanOptions())
        assert np.array_equal(pixels(picture.png), pixels(expected.png))
    lossless = get_testdata_file("JPEG-LL.dcm", download=False)
    assert pixels(next(read_scan(Path(lossless), ScanOptions())).png).std() > 5


@pytest.mark.filterwarnings("ignore")
def test_every_file_that_pydicom_ships_is_read_or_refused_with_a_reason() -> None:
    """Some 70 real files, among them broken, huge, 1-bit, 32-bit, big-endian and headerless ones."""
    folder = Path(get_testdata_file("CT_small.dcm", download=False)).parent
    read, refused = [], {}
    for file in scan_files(folder, "dicom"):
        try:
            read += [(file.name, pixels(p.png).dtype) for p in read_scan(file, ScanOptions(frames="first"))]
        except ScanError as error:
            refused[file.name] = error.reason
    assert {dtype for _, dtype in read} == {np.dtype(np.uint8)} and len(read) > 30
    assert set(refused.values()) <= {"unreadable_scan", "no_pixels", "missing_codec"}


def test_a_16_bit_png_needs_a_window_and_gets_it(tmp_path: Path, curate: Any) -> None:
    hounsfield = np.repeat(np.linspace(-1000, 1000, 80)[None], 70, 0)
    Image.fromarray((hounsfield + 32768).astype(np.uint16)).save(tmp_path / "deep.png")  # as DeepLesion stores it
    (tmp_path / "plain.jpg").write_bytes(jpeg(texture(1), 90))
    rows = [{"id": n, "images": [n], "question": "What is it?", "answer": "a ramp"} for n in ("deep.png", "plain.jpg")]
    source = {"name": "s", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    run = curate([source], ["quality"])
    assert run.dropped("quality") == {"deep.png": "unreadable_image"}
    assert "scan: {window: [centre, width]}" in run.details("quality")["deep.png"]
    shown = curate([{**source, "scan": {"window": [32808.0, 400.0]}}], ["quality"])
    deep, plain = shown.rows()
    expected = np.clip((np.floor(hounsfield[0] + 32768) - 32608) / 400, 0, 1) * 255
    assert np.abs(np.asarray(Image.open(shown.out / deep["images"][0]))[0] - expected).max() <= 1
    assert plain["images"] == [str(tmp_path / "plain.jpg")]


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def volume(path: Path, flip: bool = False) -> Path:
    """2 x 1 x 3 mm voxels; a bright block at the patient's left, front and top."""
    values = np.full((20, 30, 16), 50, np.float32)
    values[2:7, 20:28, 10:15] = 200  # RAS: small x is the patient's left
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    if flip:  # the same patient, stored from the left ear on
        values, affine = values[::-1], np.array([[-2.0, 0, 0, 38], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    noise = np.random.default_rng(zlib.crc32(str(path).encode()))
    values = values + noise.uniform(0, 1, values.shape).astype(np.float32)
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


def splits_by_patient(run: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in ("train", "validation", "test"):
        for row in run.rows(name):
            found.setdefault(row["meta"]["patient_id"], set()).add(name)
    return found


def nifti_source(folder: Path, names: list[str], **scan: Any) -> dict[str, Any]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        volume(folder / name)
    values = {"question": "What is it?", "answer": "a phantom"}
    return {"name": "s", "path": str(folder), "values": values, "scan": {"min_foreground": 0.0, **scan}}


def test_one_file_name_in_many_folders_loses_no_case(tmp_path: Path, curate: Any) -> None:
    run = curate([nifti_source(tmp_path / "v", [f"case_{n}/ct.nii.gz" for n in range(4)])], [])
    assert run.dropped("read") == {} and len(run.rows()) == 4 * 5
    assert len({row["meta"]["patient_id"] for row in run.rows()}) == 4


def test_sequences_of_one_patient_stay_in_one_split_and_no_name_is_in_the_rows(tmp_path: Path, curate: Any) -> None:
    names = [f"Meyer{n:03d}_{sequence}.nii.gz" for n in range(12) for sequence in ("t1", "T2", "flair")]
    source = nifti_source(tmp_path / "v", names)
    run = curate([source], [{"split": {"validation": 0.3, "test": 0.3}}])
    splits = splits_by_patient(run)
    assert len(splits) == 12 and all(len(found) == 1 for found in splits.values())
    assert not any("meyer" in str(row).lower() for name in ("train", "test", "validation") for row in run.rows(name))
    wide = curate([{**source, "scan": {**source["scan"], "patient": "Meyer0[01]"}}], [])
    assert len({row["meta"]["patient_id"] for row in wide.rows()}) == 2
    none = curate([{**source, "scan": {**source["scan"], "patient": "(Sub_[0-9]+)"}}], [])
    assert set(none.dropped("read").values()) == {"no_patient"} and "(Sub_[0-9]+)" in str(none.details("read"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("CASE_7/ct.nii.gz", "CASE_8/ct.nii.gz", False),
        ("Sub_001_t1.nii.gz", "Sub_001_flair.nii.gz", True),
        ("Sub_001_t1.nii.gz", "Sub_002_t1.nii.gz", False),
        ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/dwi/sub-01_ses-2_dwi.nii.gz", True),
        ("P7/ses-2/t1.nii.gz", "P7/visit 3/t2.nii", True),
        ("imagesTr/BRATS_001_0000.nii.gz", "labelsTr/BRATS_001.nii.gz", True),
        ("case_0001.nii.gz", "case_0002.nii.gz", False),
        ("volume-0.nii", "segmentation-0.nii", True),
        ("s0011/ct.nii.gz", "s0012/ct.nii.gz", False),
    ],
)
def test_public_layouts_tell_the_patient(one: str, other: str, same: bool) -> None:
    assert (patient_of(one) == patient_of(other)) is same


def test_bad_options_are_refused() -> None:
    for bad in ({"patient": "(Sub"}, {"plane": "oblique"}, {"frames": "second"}, {"window": (1.0,)}, {"every_mm": 0.0}):
        with pytest.raises(ScanError):
            ScanOptions(**bad)  # type: ignore[arg-type]


def test_files_are_found_by_name_or_mark(tmp_path: Path) -> None:
    dicom(tmp_path / "IM0001", RAMP)
    volume(tmp_path / "v.nii.gz")
    (tmp_path / "notes").write_text("x" * 200)
    assert [p.name for p in scan_files(tmp_path, "dicom")] == ["IM0001"]
    assert [p.name for p in scan_files(tmp_path, "nifti")] == ["v.nii.gz"]


# ------------------------------------------------------------------------------------------------------ hostile files


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ScanError) as error:
        list(read_scan(path, ScanOptions(**options)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("frames", ["first", "middle", "all"])
@pytest.mark.parametrize("count", ["1000000000", "-3", "9" * 12])
def test_frames_that_a_file_cannot_hold_are_not_counted_through(tmp_path: Path, frames: str, count: str) -> None:
    path = dicom(tmp_path / "a.dcm", RAMP[:4, :4], NumberOfFrames=count)
    tracemalloc.start()
    assert f"says that it has {int(count)} frames, in 32 bytes of pixels" in refusal(path, frames=frames)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "attributes",
    [
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 0},
        {"BitsAllocated": 7},
        {"SamplesPerPixel": 3},
        {"PixelSpacing": [1e6, 1e-3]},
        {"RescaleSlope": "1e999"},
        {"PhotometricInterpretation": "NONSENSE", "SamplesPerPixel": 2},
    ],
    ids=str,
)
def test_a_header_that_fits_no_picture_is_one_refused_file(tmp_path: Path, attributes: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        shown = list(read_scan(dicom(tmp_path / "a.dcm", RAMP, **attributes), ScanOptions()))
        assert len(shown) == 1 and pixels(shown[0].png).shape == RAMP.shape  # a slope of infinity is still a picture's
    except ScanError as error:
        assert "a.dcm" in str(error) or "pixels of" in str(error)
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name",
    ["SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_jpeg_gdcm.dcm"],
)
def test_a_stream_of_another_size_than_the_header_reaches_no_decoder(tmp_path: Path, name: str) -> None:
    """Of JPEG-LS, gdcm ends the process; of JPEG 2000, openjpeg reserves gigabytes."""
    source = get_testdata_file(name, download=False)
    if source is None:
        pytest.skip(f"pydicom's {name} is not here")
    data = pydicom.dcmread(source)
    frame = bytearray(next(generate_frames(data.PixelData, number_of_frames=1)))
    ((rows, columns, samples),) = stream_sizes(bytes(frame))
    assert (rows, columns, samples) == (data.Rows, data.Columns, data.SamplesPerPixel)
    sizes = {
        struct.pack(">HH", rows, columns): struct.pack(">HH", 60000, 60000),
        struct.pack(">II", columns, rows): struct.pack(">II", 60000, 60000),
    }
    for told, larger in sizes.items():
        frame = frame.replace(told, larger)
    data.PixelData = encapsulate([bytes(frame)])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm")
    assert "its header says (" in refusal(tmp_path / "a.dcm")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_volume_larger_than_its_file_is_not_reserved(tmp_path: Path, kind: Any, ending: str) -> None:
    data = bytearray(kind(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes())
    side = struct.pack("<h", 30000) if kind is nibabel.Nifti1Image else struct.pack("<q", 30000)
    at = 42 if kind is nibabel.Nifti1Image else 24
    data[at : at + 3 * len(side)] = side * 3
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(bytes(data)) if ending.endswith("gz") else bytes(data))
    assert "says that it has 30000 x 30000 x 30000 voxels" in refusal(path)


@pytest.mark.parametrize("side", [0.0, 1e-30, 1e30, float("nan"), float("inf")])
def test_voxels_that_no_scanner_makes_are_refused(tmp_path: Path, side: float) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4))
    image.header["srow_x"][0] = side
    image.header["pixdim"][1] = side
    data = bytearray(image.to_bytes())
    data[280:284] = struct.pack("<f", side)  # srow_x, as some tools leave it
    (tmp_path / "a.nii").write_bytes(bytes(data))
    assert "a.nii" in refusal(tmp_path / "a.nii")


def test_a_bad_scan_costs_its_own_row(tmp_path: Path) -> None:
    dicom(tmp_path / "good.dcm", RAMP)
    dicom(tmp_path / "endless.dcm", RAMP, NumberOfFrames="1000000000")
    (tmp_path / "short.dcm").write_bytes((tmp_path / "good.dcm").read_bytes()[:700])
    (tmp_path / os.fsdecode(b"\xff.dcm")).write_bytes(b"no dicom")  # a name that is no UTF-8
    records = list(read_rows(Source(str(tmp_path), values={"question": "What is it?", "answer": "a ramp"})))
    assert [record.reason for record in records].count("") == 1 and len(records) == 4
    for record in records:
        json.dumps([record.place, record.detail, record.row], default=len, ensure_ascii=False).encode()


def aborting() -> bytes:
    """The table before the codes is 8 bytes short: GDCM throws what nothing catches."""
    data = Path(get_testdata_file("SC_jpeg_no_color_transform_2.dcm", download=False)).read_bytes()
    codes = data.index(b"\xff\xc4")
    return data[: codes - 8] + data[codes:]


@pytest.mark.parametrize("pixels", [True, False])
def test_what_a_damaged_header_holds_as_its_modality_is_not_told(tmp_path: Path, pixels: bool) -> None:
    """Its length may be wrong, and the patient's name stand within it."""
    data = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    data.Modality = "MR\x10\x00Doe^Jane" + "x" * 1_000
    if not pixels:
        del data.PixelData
    data.save_as(tmp_path / "a.dcm")
    try:
        told = repr([picture.facts for picture in read_scan(tmp_path / "a.dcm", ScanOptions())])
    except ScanError as error:
        told = str(error)
    assert "Doe" not in told and len(told) < 900 and ("no modality" in told) is not pixels


def test_a_decoder_that_ends_its_process_ends_not_this_one(tmp_path: Path) -> None:
    """The next file is read by a new one."""
    whole = Path(get_testdata_file("SC_rgb_jpeg_gdcm.dcm", download=False))
    decoder = Decoder(DECODER.module)
    expected = decoder.frame(whole, 0)
    process = decoder.process
    assert process is not None
    process.kill()
    process.wait()
    assert np.array_equal(decoder.frame(whole, 0), expected)  # one that ended between two frames
    damaged = tmp_path / "a.dcm"
    damaged.write_bytes(aborting())
    with pytest.raises(ScanError, match=r"a\.dcm: frame 0 ended its decoder"):
        decoder.frame(damaged, 0)
    assert np.array_equal(decoder.frame(whole, 0), expected)
    assert decoder.process is not None
    decoder.process.kill()


def test_frames_come_out_of_the_decoders_process_as_out_of_this_one() -> None:
    for name in (
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_RLE.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "examples_ybr_color.dcm",
    ):
        path = Path(get_testdata_file(name, download=False))
        assert np.array_equal(DECODER.frame(path, 0), pixel_array(path, index=0))
    with pytest.raises(ScanError, match="frame 99 cannot be decoded"):
        DECODER.frame(path, 99)

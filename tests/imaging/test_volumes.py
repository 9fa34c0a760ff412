"""CT and MR volumes as images of a row: the right slices, upright, however the files store them, in every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lingshu_rl.curate.readers import Source as CurateSource
from lingshu_rl.curate.readers import read_rows
from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.eval.loading import _data_hash
from lingshu_rl.eval.scoring import cluster_name
from lingshu_rl.imaging import voxels
from lingshu_rl.imaging.images import Picture
from lingshu_rl.imaging.pixels import PLANES, ScanOptions
from lingshu_rl.imaging.scans import read_scan
from lingshu_rl.imaging.volumes import View, VolumeError, spread, views_of
from lingshu_rl.imaging.voxels import grid_of

SPACING = (1.0, 1.5, 3.0)
WINDOW = [40, 400]


def hounsfield() -> np.ndarray:
    """24 x 20 x 18 voxels to the right, front and top, no two planes alike."""
    x, y, z = np.meshgrid(np.arange(24), np.arange(20), np.arange(18), indexing="ij")
    return (x * 9 + y * 13 + z * 17 - 300).astype(np.int16)


def nifti(path: Path, axes: str = "RAS", values: np.ndarray | None = None) -> Path:
    """The volume stored along these axes."""
    image = nibabel.Nifti1Image(hounsfield() if values is None else values, np.diag([*SPACING, 1.0]))
    wanted = nibabel.orientations.axcodes2ornt(axes)
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(turned, path)
    return path


def header(name: str, shape: tuple[int, int]) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[name])
    data = FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.SliceThickness = "CT", "1.2.3", "2"
    data.Rows, data.Columns = shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    return data


def sections(plane: str) -> list[tuple[np.ndarray, list[float], list[float], list[float]]]:
    """(pixels, position, orientation, spacing) of a series acquired in this plane, in DICOM's left, back, top."""
    values, (dx, dy, dz) = hounsfield() + 1024, SPACING
    if plane == "axial":  # rows run to the patient's back, columns to the left
        return [
            (values[::-1, ::-1, k].T, [-23 * dx, -19 * dy, k * dz], [1, 0, 0, 0, 1, 0], [dy, dx]) for k in range(18)
        ]
    # sagittal: rows run to the feet, columns to the back
    return [(values[i, ::-1, ::-1].T, [-i * dx, -19 * dy, 17 * dz], [0, 1, 0, 0, 0, -1], [dz, dy]) for i in range(24)]


def series(folder: Path, plane: str = "axial", **attributes: Any) -> Path:
    folder.mkdir(parents=True)
    found = sections(plane)
    for number, (pixels, position, orientation, spacing) in enumerate(found):
        name = f"IM{number * 7 % len(found):04d}"  # names in no order, without an ending
        data = header(name, pixels.shape)
        data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing = position, orientation, spacing
        for key, value in attributes.items():
            setattr(data, key, value)
        data.PixelData = np.ascontiguousarray(pixels).astype("<u2").tobytes()
        data.save_as(folder / name)
    return folder


def enhanced(path: Path) -> Path:
    """All slices in one file, each with its position among its functional groups."""

    def item(**values: Any) -> Dataset:
        made = Dataset()
        for key, value in values.items():
            setattr(made, key, value)
        return made

    found = sections("axial")[::-1]
    data = header(path.name, found[0][0].shape)
    data.NumberOfFrames = len(found)
    _, _, orientation, spacing = found[0]
    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=orientation)]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=spacing, SliceThickness="3")]),
    )
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(
        [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=place)])) for _, place, _, _ in found]
    )
    data.PixelData = np.stack([np.ascontiguousarray(pixels) for pixels, *_ in found]).astype("<u2").tobytes()
    data.save_as(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(voxels.CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(file: Path, plane: str) -> list[np.ndarray]:
    names = views_of({"volume": str(file), "slices": 99, "plane": plane, "window": WINDOW}, None)
    views = [View.of(name) for name in names]
    images = [view.image() for view in views]
    assert [view.size for view in views] == [image.size for image in images]  # what the header says
    return [np.asarray(image) for image in images]


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """Every slice as curation makes it of the same volume."""
    file = nifti(tmp_path_factory.mktemp("oracle") / "v.nii.gz")
    found = {}
    for plane in PLANES:
        options = ScanOptions(plane=plane, every_mm=0.1, min_foreground=0.0, window=(40.0, 400.0))
        found[plane] = list(read_scan(file, options))
    return found


STORED = {
    "RAS.nii.gz": lambda path: nifti(path),
    "LPI.nii": lambda path: nifti(path, "LPI"),
    "ASR.nii.gz": lambda path: nifti(path, "ASR"),
    "PIL.nii.gz": lambda path: nifti(path, "PIL"),
    "axial": lambda path: series(path),
    "sagittal": lambda path: series(path, "sagittal"),
    "enhanced.dcm": enhanced,
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("stored", STORED)
def test_however_it_is_stored_the_slices_are_those_of_curation(tmp_path, curated, stored, plane):
    import io

    found = pictures(STORED[stored](tmp_path / stored), plane)
    wanted = [np.asarray(Image.open(io.BytesIO(one.png))) for one in curated[plane]]
    assert len(found) == len(wanted) > 10
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_values_with_a_slope_and_no_window(tmp_path):
    """As nibabel scales them; the middle 99 % of all values makes black and white."""
    image = nibabel.Nifti1Image(hounsfield(), np.eye(4))
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "v.nii.gz")
    values = np.asarray(nibabel.load(tmp_path / "v.nii.gz").dataobj)
    (name,) = views_of({"volume": str(tmp_path / "v.nii.gz"), "slices": [7]}, None)
    low, high = np.percentile(values[::2, ::2, ::2], (0.5, 99.5))
    wanted = np.rint(np.clip((values[:, :, 7].T[::-1, ::-1] - low) / (high - low), 0, 1) * 255)
    assert np.array_equal(np.asarray(View.of(name).image()), wanted)


@pytest.mark.parametrize(
    ("first", "last", "count", "wanted"),
    [
        (0, 18, 3, (3, 9, 15)),
        (0, 18, 1, (9,)),
        (0, 18, 18, tuple(range(18))),
        (0, 5, 16, (0, 1, 2, 3, 4)),
        (4, 8, 2, (5, 7)),
        (0, 10, 4, (1, 3, 6, 8)),
    ],
)
def test_slices_are_the_middles_of_equal_parts(first, last, count, wanted):
    assert spread(first, last, count) == wanted


def test_slices_around_a_mask_or_by_index(tmp_path):
    file = str(nifti(tmp_path / "v.nii.gz"))
    mask = np.zeros((24, 20, 18), np.uint8)
    mask[5:9, 3:6, 4:8], mask[2, 2, 17] = 2, 1
    nifti(tmp_path / "m.nii.gz", "LPI", mask)

    def asked(**more):
        names = views_of({"volume": file, "mask": "m.nii.gz", "slices": 2, **more}, tmp_path)
        return [View.of(name).indices[0] for name in names]

    assert asked(label=2) == [5, 7] and asked() == [7, 14] and asked(label=2, plane="sagittal") == [6, 8]
    names = views_of({"volume": file, "slices": [17, 0]}, tmp_path)
    assert [View.of(name).indices for name in names] == [(17,), (0,)]


def test_a_montage_is_one_picture_in_reading_order(tmp_path):
    file = str(nifti(tmp_path / "v.nii.gz"))
    stack = [View.of(n).image() for n in views_of({"volume": file, "slices": 5, "window": WINDOW}, None)]
    (name,) = views_of({"volume": file, "slices": 5, "window": WINDOW, "layout": "montage"}, None)
    montage, (width, height) = View.of(name).image(), stack[0].size
    assert montage.size == View.of(name).size == (3 * width, 2 * height)
    for place, one in enumerate(stack):
        x, y = place % 3 * width, place // 3 * height
        assert montage.crop((x, y, x + width, y + height)).tobytes() == one.tobytes()
    assert not np.asarray(montage)[height:, 2 * width :].any()


def row(**more: Any) -> dict[str, Any]:
    return {"id": "a", "images": [{"volume": "v.nii.gz", "slices": 3, "window": WINDOW}], "question": "Is it dense?",
            "answer": "yes", "kind": "yesno", **more}  # fmt: skip


def test_a_volume_in_a_conversation_is_as_many_images(tmp_path):
    nifti(tmp_path / "v.nii.gz")
    Image.new("L", (60, 60), 9).save(tmp_path / "x.png")
    turn = [{"type": "text", "text": "A:"}, {"type": "image"}, {"type": "text", "text": "B:"}, {"type": "image"}]
    asked = row(images=["x.png", *row()["images"]], messages=[{"role": "user", "content": turn}])
    del asked["question"]
    prompt = row_to_prompt(asked, base_dir=tmp_path)
    kinds = [part["type"] for part in prompt.messages[0]["content"]]
    assert len(prompt.images) == 4 and kinds == ["text", "image", "text", *["image"] * 3, "text"]
    assert [View.of(p.source).indices[0] for p in prompt.images[1:]] == [3, 9, 15]
    assert len(row_to_prompt(row(), base_dir=tmp_path).images) == 3
    assert prompt.images[1].blank().size == prompt.images[1].size


def test_a_source_may_say_that_its_images_are_volumes(tmp_path):
    for name in ("a", "b"):
        nifti(tmp_path / "scans" / f"{name}.nii.gz")
    rows = [{"qid": n, "question": "Is it dense?", "answer": "yes", "image": f"{n}.nii.gz"} for n in ("a", "b")]
    (tmp_path / "theirs.json").write_text(json.dumps(rows))
    fields = {"id": "qid", "question": "question", "answer": "answer", "images": "image"}
    for settings, size in (({"slices": 4}, 4), ({"slices": 4, "layout": "montage"}, 1)):
        source = {"path": str(tmp_path / "theirs.json"), "map": fields, "image_dir": str(tmp_path / "scans")}
        loaded = load({**source, "values": {"kind": "yesno"}, "volume": settings})
        assert [len(p.images) for p in loaded.prompts] == [size, size]
    own = [row(id=n, images=[f"{n}.nii.gz"]) for n in ("a", "b")]
    (tmp_path / "scans" / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    loaded = load({"path": str(tmp_path / "scans" / "own.jsonl"), "volume": {"slices": 2}})
    assert [len(p.images) for p in loaded.prompts] == [2, 2]


def test_rows_of_one_volume_are_one_cluster(tmp_path):
    nifti(tmp_path / "v.nii.gz")
    one, other = (row_to_prompt(row(images=[{"volume": "v.nii.gz", "slices": n}]), base_dir=tmp_path) for n in (2, 5))
    assert cluster_name(one) == cluster_name(other) == str(tmp_path / "v.nii.gz")


def test_an_evaluations_data_are_others_with_other_slices(tmp_path):
    nifti(tmp_path / "v.nii.gz")
    asked = [row(images=[{"volume": "v.nii.gz", "slices": [n]}]) for n in (3, 3, 9)]
    first, same, other = (_data_hash([row_to_prompt(one, base_dir=tmp_path)]) for one in asked)
    assert first == same != other


def test_the_fingerprint_follows_slices_and_content_not_the_folder(tmp_path):
    def mark(folder: Path, values: np.ndarray | None = None, **more: Any) -> str:
        nifti(folder / "v.nii.gz", values=values)
        return load([row(images=[{**row()["images"][0], **more}])], base_dir=folder).fingerprint

    first = mark(tmp_path / "a")
    assert first == mark(tmp_path / "b")
    assert len({first, mark(tmp_path / "c", slices=4), mark(tmp_path / "d", np.zeros((24, 20, 9), np.int16))}) == 3


def broken(folder: Path) -> dict[str, dict[str, Any]]:
    """Images of a row that cannot be used, by what their refusal names."""
    (folder / "text.nii.gz").write_text("no volume")
    (folder / "notes.txt").write_text("no volume")
    nifti(folder / "v.nii.gz")
    nifti(folder / "empty.nii.gz", values=np.zeros((24, 20, 18), np.int16))
    cut = (folder / "v.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(cut[: len(cut) // 2])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 7), np.int16), np.eye(4)), folder / "time.nii.gz")
    huge = nibabel.Nifti1Header()
    huge.set_data_shape((30000, 30000, 30000))
    (folder / "huge.nii").write_bytes(huge.binaryblock + b"\0" * 400)
    series(folder / "two", "axial")
    for file in list((folder / "two").iterdir()):
        shutil.copy(file, folder / "two" / f"copy_{file.name}")
    series(folder / "coloured", SamplesPerPixel=3)
    (folder / "nothing").mkdir()
    return {
        "volume not found": {"volume": "absent.nii.gz"},
        "text.nii.gz: not a readable volume": {"volume": "text.nii.gz"},
        "cut.nii.gz: not a readable volume": {"volume": "cut.nii.gz"},
        "notes.txt is no volume": {"volume": "notes.txt"},
        "4 x 4 x 4 x 7": {"volume": "time.nii.gz"},
        "30000 x 30000 x 30000 voxels": {"volume": "huge.nii"},
        "two slices stand at one position": {"volume": "two"},
        "coloured picture": {"volume": "coloured"},
        "holds no DICOM file": {"volume": "nothing"},
        "unknown": {"volume": "v.nii.gz", "slice": 4},
        "plane of a volume is one of": {"volume": "v.nii.gz", "plane": "oblique"},
        "layout of a volume": {"volume": "v.nii.gz", "layout": "grid"},
        "window of a volume": {"volume": "v.nii.gz", "window": [40, -1]},
        "window of a volume is": {"volume": "v.nii.gz", "window": 40},
        "at least 1": {"volume": "v.nii.gz", "slices": 0},
        "or a list of indices; got '16'": {"volume": "v.nii.gz", "slices": "16"},
        "from 0 to 17": {"volume": "v.nii.gz", "slices": [18]},
        "is empty": {"volume": "v.nii.gz", "mask": "empty.nii.gz"},
        "not both": {"volume": "v.nii.gz", "mask": "empty.nii.gz", "slices": [1]},
        "path of a file or folder": {"volume": 5},
    }


def test_what_cannot_be_used_is_a_refused_row(tmp_path):
    cases = broken(tmp_path)
    rows = [row(id=told, images=[image]) for told, image in cases.items()]
    with pytest.raises(DataError) as error:
        load([row(id="good"), *rows], base_dir=tmp_path)
    reasons = {one.id: one.reason for one in error.value.refused}
    assert reasons.keys() == cases.keys() - {"unknown"} | {"unknown"}
    missing = {told: reasons[told] for told in cases if told not in reasons[told] and told != "unknown"}
    assert missing == {} and "'slice'" in reasons["unknown"]
    kept = load([row(id="good"), *rows], base_dir=tmp_path, skip_bad_rows=True)
    assert [p.id for p in kept.prompts] == ["good"]


def test_a_view_that_is_gone_is_named(tmp_path):
    file = nifti(tmp_path / "v.nii.gz")
    picture = Picture(f"{file}#axial=40")
    assert "18 axial slices, asked is 40" in str(picture.fault())
    with pytest.raises(VolumeError):
        row_error = View.of(f"{tmp_path}/w.nii.gz#axial=0")
        assert row_error is not None and row_error.size
    assert View.of("/data/patient#axial=x") is None and View.of("/data/ct.nii.gz") is None
    with pytest.raises(RowError, match="path of a file"):
        row_to_prompt(row(images=[{"volume": ["v.nii.gz"]}]), base_dir=tmp_path)


def test_slices_are_decoded_once_and_again_when_the_file_changes(tmp_path, cache, monkeypatch):
    file = nifti(tmp_path / "v.nii.gz")
    first = [image.tobytes() for image in pictures(file, "axial")]
    kept = sorted(cache.rglob("*.png"))
    assert len(kept) == 18
    reading = voxels.read_voxels
    monkeypatch.setattr(voxels, "read_voxels", lambda file: pytest.fail("decoded again"))
    assert [image.tobytes() for image in pictures(file, "axial")] == first
    monkeypatch.setattr(voxels, "read_voxels", reading)
    for damaged in kept:
        damaged.write_bytes(damaged.read_bytes()[:40])
    assert [image.tobytes() for image in pictures(file, "axial")] == first
    nifti(file, values=hounsfield() + np.int16(50))
    assert [image.tobytes() for image in pictures(file, "axial")] != first


def test_without_a_cache_to_write_to_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(voxels.CACHE_ENV, str(tmp_path / "file" / "slices"))
    assert len(pictures(nifti(tmp_path / "v.nii.gz"), "coronal")) == 20


def test_curation_keeps_the_slices_as_pictures(tmp_path):
    nifti(tmp_path / "v.nii.gz")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row(id="b", images=[{"volume": "w"}])))
    kept: list[bytes] = []
    found = list(
        read_rows(CurateSource(str(tmp_path / "rows.jsonl")), lambda data: kept.append(data) or f"{len(kept)}.png")
    )
    assert found[0].row is not None and found[0].row["images"] == ["1.png", "2.png", "3.png"]
    assert found[1].row is None and "not found" in found[1].detail
    wanted = [View.of(n).image() for n in views_of({**row()["images"][0], "volume": str(tmp_path / "v.nii.gz")}, None)]
    assert [Picture(data).pixels().convert("L").tobytes() for data in kept] == [
        Picture(volumes_png(image)).pixels().convert("L").tobytes() for image in wanted
    ]


def volumes_png(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_grid_is_read_from_the_header_alone(tmp_path, monkeypatch):
    """Nothing behind it is opened; a file that is too short for it is refused before."""
    file = nifti(tmp_path / "v.nii", "ASR")
    monkeypatch.setattr("nibabel.arrayproxy.ArrayProxy._get_unscaled", lambda *_: pytest.fail("voxels were read"))
    assert grid_of(str(file)).shape == (24, 20, 18) and grid_of(str(file)).spacing == SPACING
    file.write_bytes(file.read_bytes()[:6000])
    with pytest.raises(VolumeError, match="20 x 18 x 24 voxels, 17,280 bytes, in 6,000"):
        grid_of(str(file))

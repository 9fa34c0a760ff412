"""The demo's data: real images, answers that cannot be guessed, nothing shared between training and test."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image

from lingshu_rl.data.load import load
from lingshu_rl.demo import brain, studies
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.images import APART_BITS, SIZE, SPLITS
from lingshu_rl.demo.questions import TASKS, sft_text

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return build_demo()


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in SPLITS}


def words(row: dict[str, Any]) -> str:
    """The right answer in words: for an option row the option's text."""
    return row["options"]["ABCD".index(row["answer"])] if row["kind"] == "option" else row["answer"]


def by(rows: list[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple({**row, **row["meta"]}[key] for key in keys)].append(row)
    return groups


# --- what there is ----------------------------------------------------------------------------------------------------


def test_counts_kinds_and_modalities(rows: Rows) -> None:
    assert [len(rows[split]) for split in SPLITS] == [2000, 298, 400]
    for split in SPLITS:
        kinds = Counter(row["kind"] for row in rows[split])
        assert set(kinds) == {"option", "yesno", "numeric", "report"}
        assert kinds["option"] >= len(rows[split]) / 3
        assert min(kinds.values()) >= len(rows[split]) / 10
        assert {row["meta"]["task"] for row in rows[split]} == {task.name for task in TASKS}
        assert len({row["meta"]["modality"] for row in rows[split]}) == 7
        assert len({row["images"][0] for row in rows[split]}) >= len(rows[split]) / 2
    assert {row["unit"] for row in rows["test"] if "unit" in row} == {"mm", "cm2", "mL", "%"}


def test_every_split_loads_without_a_refused_row() -> None:
    for split in SPLITS:
        loaded = load(f"demo:{split}", instruction="short")
        assert not loaded.refused and len({prompt.id for prompt in loaded.prompts}) == len(loaded.prompts)
        assert all(
            prompt.meta["task"] and prompt.meta["patient_id"] and prompt.meta["source"] for prompt in loaded.prompts
        )


def test_images_are_small_and_show_something(folder: Path, rows: Rows) -> None:
    for path in sorted({row["images"][0] for split in SPLITS for row in rows[split]}):
        with Image.open(folder / path) as image:
            assert image.size == (SIZE, SIZE) and image.mode in ("L", "RGB")
            assert np.asarray(image.convert("L"), float).std() > 4, path


def test_vocabulary_is_closed_and_small(rows: Rows) -> None:
    def used(split: str) -> set[str]:
        texts = (" ".join([row["question"], *row.get("options", ()), row["answer"]]) for row in rows[split])
        return {word.strip(".,?:") for text in texts for word in text.split()}

    assert len(used("train")) <= 300
    assert used("test") <= used("train") and used("validation") <= used("train")


def test_sft_text_thinks_the_option_in_its_own_words_then_answers(rows: Rows) -> None:
    for row in rows["train"]:
        think, answer = sft_text(row).removesuffix(" </answer>").split(" </think><answer> ")
        assert think.startswith("<think> ") and answer == row["answer"]
        if row["kind"] == "option":
            assert think.removeprefix("<think> ") == words(row)


# --- what cannot be guessed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_constant_answer_scores_near_chance(rows: Rows, split: str) -> None:
    groups = by(rows[split], "kind")
    share = {
        kind[0]: Counter(row["answer"] for row in group).most_common(1)[0][1] / len(group)
        for kind, group in groups.items()
    }
    assert share["option"] <= 0.40 and share["yesno"] <= 0.52 and share["numeric"] <= 0.15 and share["report"] <= 0.10
    sentences = [set(row["answer"].removesuffix(".").split(". ")) for row in groups["report",]]
    overlap = max(np.mean([2 * len(a & b) / (len(a) + len(b)) for b in sentences]) for a in sentences)
    assert overlap <= 0.35


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_even_within_a_task(rows: Rows, split: str) -> None:
    for (task, size), group in by(
        [{"size": len(row.get("options", ())), **row} for row in rows[split]], "task", "size"
    ).items():
        if size:
            letters = Counter(row["answer"] for row in group)
            assert max(letters.values()) - min(letters["ABCD"[i]] for i in range(size)) <= 1, (task, size, letters)
    axial = [
        {"axial": "axial" in row["question"], **row} for row in rows[split]
    ]  # levels have other names in each plane
    for (task, kind, _), group in by(axial, "task", "kind", "axial").items():
        if kind in ("option", "yesno") and task != "width_option":
            counts = Counter(words(row) for row in group)
            assert max(counts.values()) <= 1.25 * len(group) / len(counts), (task, counts)


def test_the_question_alone_does_not_give_the_answer(rows: Rows) -> None:
    """The best guess from the training answers to the same question, among the options if there are any."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows["train"]:
        seen[row["question"]][words(row)] += 1
    hits = defaultdict(list)
    for row in rows["test"]:
        guess = max(row.get("options") or sorted(seen[row["question"]]), key=lambda text: seen[row["question"]][text])
        hits[row["kind"]].append(guess == words(row))
    rate = {kind: np.mean(found) for kind, found in hits.items()}
    assert rate["option"] <= 0.45 and rate["yesno"] <= 0.65 and rate["numeric"] <= 0.25 and rate["report"] <= 0.15, rate


def test_wrong_widths_are_clearly_wrong(rows: Rows) -> None:
    for row in by(rows["train"] + rows["test"], "task")["width_option",]:
        millimetres = sorted(int(option.removesuffix(" mm")) for option in row["options"])
        right = int(words(row).removesuffix(" mm"))
        assert min(abs(mm - right) for mm in millimetres if mm != right) >= 40


def test_the_tolerance_takes_one_step_only(rows: Rows) -> None:
    for row in by(rows["train"], "kind")["numeric",]:
        step = int(row["question"].split("nearest ")[1].split()[0].rstrip("?"))
        assert int(row["answer"].split()[0]) % step == 0 and row["tolerance"]["abs"] < step / 2
        assert row["answer"].split()[1:] == ([row["unit"]] if "unit" in row else [])


# --- nothing shared ---------------------------------------------------------------------------------------------------


def test_no_test_image_resembles_a_training_image(folder: Path, rows: Rows) -> None:
    """64-bit pHash: at least APART_BITS bits apart, over every pair of images in use."""
    paths = {split: sorted({row["images"][0] for row in rows[split]}) for split in SPLITS}
    hashes = {
        split: np.stack([imagehash.phash(Image.open(folder / path)).hash.ravel() for path in paths[split]])
        for split in SPLITS
    }
    for split in ("validation", "test"):
        assert not set(paths[split]) & set(paths["train"])
        distance = (hashes[split][:, None] != hashes["train"][None]).sum(-1)
        assert distance.min() >= APART_BITS, paths[split][distance.min(1).argmin()]


def test_slabs_of_the_brain_lie_apart() -> None:
    for plane, slabs in brain.SLABS_MM.items():
        ranges = sorted((low, high, split) for split, pieces in slabs.items() for low, high in pieces)
        for (_, end, split), (start, _, other) in itertools.pairwise(ranges):
            assert start - end >= (4 if split != other else 0), (plane, split, end, other, start)


def test_regions_of_shared_pictures_lie_apart() -> None:
    shared = [study for study in studies.STUDIES if sum(count > 0 for count in study.counts) > 1]
    assert shared
    for study in shared:
        boxes = [study.boxes[split] for split, count in zip(SPLITS, study.counts, strict=True) if count]
        for i, (left, top, right, bottom) in enumerate(boxes):
            for l2, t2, r2, b2 in boxes[i + 1 :]:
                assert l2 - right >= 0.02 or left - r2 >= 0.02 or t2 - bottom >= 0.02 or top - b2 >= 0.02, study.name


def test_ct_and_ultrasound_test_on_patients_never_trained_on(rows: Rows) -> None:
    for modality in ("CT", "ultrasound"):
        patients = {
            split: {r["meta"]["patient_id"] for r in by(rows[split], "modality")[modality,]} for split in SPLITS
        }
        assert all(patients.values()) and not patients["train"] & (patients["test"] | patients["validation"])


# --- what is measured -------------------------------------------------------------------------------------------------


def test_lengths_and_areas_are_those_of_the_voxels() -> None:
    """A disc of 120 mm has one width at every angle and place."""
    y, x = np.mgrid[:197, :233] - np.array([98, 116])[:, None, None]
    disc = np.where(x**2 + y**2 <= 60**2, 255, 0).astype(np.uint8)
    cut = dict.fromkeys(("t1", "gm", "wm", "brain", "ventricle"), disc)
    drawn = [brain._image(cut, "axial", 0, "disc", "train", np.random.default_rng(seed)).facts for seed in range(20)]
    measured = [facts for facts in drawn if "width_mm" in facts]
    assert len(measured) > 5
    for facts in measured:
        assert facts["width_mm"] == pytest.approx(121, abs=2) and facts["height_mm"] == pytest.approx(121, abs=2)
        assert facts["area_cm2"] == pytest.approx(np.pi * 36, rel=0.01)
        assert facts["grey_percent"] == pytest.approx(100, abs=2)


def test_the_ventricles_are_as_large_as_a_young_adults() -> None:
    volumes, _ = brain.volumes()
    assert 10 <= (volumes["ventricle"] > 0).sum() / 1000 <= 25  # mL
    assert 1800 <= (volumes["brain"] > 0).sum() / 1000 <= 1950


def test_nuclei_and_brown_are_counted_in_the_crop_alone() -> None:
    assert studies._nuclei(np.empty(0), (0, 0, 512)) == {"nuclei": 125}
    quarters = [studies._nuclei(np.empty(0), (x, y, 256))["nuclei"] for x in (0, 256) for y in (0, 256)]
    assert 115 <= sum(quarters) <= 127  # one cut in four may be in none
    crop = np.full((10, 10, 3), 200, np.uint8)
    crop[:3] = (150, 100, 60)
    assert studies._brown(crop, (0, 0, 10)) == {"brown_percent": pytest.approx(30)}


# --- the build --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_build_is_the_same_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    def digests(root: Path) -> dict[str, str]:
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    fresh = build_demo(tmp_path)
    assert fresh.name == folder.name and digests(fresh) == digests(folder)
    assert [path.name for path in tmp_path.iterdir()] == [fresh.name]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> None:
        raise FileNotFoundError("img2d.tif")

    monkeypatch.setattr("lingshu_rl.demo.build.all_images", broken)
    with pytest.raises(FileNotFoundError, match=r"img2d\.tif"):
        build_demo(tmp_path)
    assert not list(tmp_path.iterdir())

"""Near-duplicate texts: re-worded copies are found, texts that say something else are not."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingshu_rl.curate.texts import (
    MIN_RECALL,
    TextIndex,
    asked,
    band_shape,
    jaccard,
    shingles,
    stated,
    telling_words,
    words,
)

REPORT = (
    "The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax. Bones are intact."
)


@pytest.fixture
def index(tmp_path: Path) -> TextIndex:
    return TextIndex(tmp_path / "texts.sqlite")


@pytest.mark.parametrize(
    "other",
    [
        REPORT.upper(),
        "The lungs are clear. The heart is normal in size. Bones are intact. There is no pleural effusion or pneumothorax.",
        REPORT.replace("intact", "unbroken"),
        REPORT.replace(". ", " ;  "),
    ],
)
def test_a_re_worded_copy_is_found(index: TextIndex, other: str) -> None:
    index.add(REPORT, "first")
    assert index.find(other).owner == "first"


@pytest.mark.parametrize(
    "other",
    [
        REPORT.replace("no pleural", "a pleural"),  # negation
        REPORT.replace("pleural effusion", "left pleural effusion"),  # side
        REPORT.replace("normal in size", "enlarged in size"),
        REPORT.replace("intact.", "intact. A nodule of 4 mm."),
    ],
)
def test_a_text_with_another_finding_is_not_unless_the_guard_is_off(
    index: TextIndex, tmp_path: Path, other: str
) -> None:
    index.add(REPORT, "first")
    assert index.find(other) is None
    loose = TextIndex(tmp_path / "loose.sqlite", guard=False)
    loose.add(REPORT, "first")
    assert loose.find(other).owner == "first"


def test_groups_do_not_see_each_other(index: TextIndex) -> None:
    index.add(REPORT, "first", group="picture 1")
    assert index.find(REPORT, group="picture 2") is None
    assert index.find(REPORT, group="picture 1").score == 1.0
    assert index.find_or_add(REPORT, "second", group="picture 2") is None
    assert index.find(REPORT, group="picture 2").owner == "second"


def test_a_template_in_every_bucket_does_not_hide_an_exact_copy(index: TextIndex) -> None:
    texts = [f"{REPORT} Film number {i} of the series was read by reader {i % 7}." for i in range(300)]
    for i, text in enumerate(texts):
        index.add(text, str(i))
    assert index.find(texts[3]).owner == "3"


def test_threshold_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threshold must lie between"):
        TextIndex(tmp_path / "t.sqlite", threshold=0.1)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_bands_propose_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert 1 - (1 - threshold**rows) ** bands >= MIN_RECALL and bands * rows <= 128


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_jaccard_is_symmetric_and_one_for_equal_texts(a: str, b: str) -> None:
    assert jaccard(shingles(a), shingles(b)) == jaccard(shingles(b), shingles(a))
    assert jaccard(shingles(a), shingles(a)) == 1.0
    assert telling_words(a) == telling_words(a.upper().lower()) or not a.isascii()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is there evidence of hemorrhage in this study?", "Is there evidence of calcification in this study?"),
        ("Does this image show a pleural effusion?", "Does this image show a pneumothorax?"),
        ("Is the left lung larger than the right?", "Is the right lung larger than the left?"),
        ("Is the liver larger than the spleen?", "Is the spleen larger than the liver?"),
        ("Is the tube near the carina?", "Is no tube near the carina?"),
        ("What is the mass?", "Where is the mass?"),
        ("What is the size of the mass?", "What is the mass?"),
        ("Which vitamin does grade 2 need?", "Which vitamin does grade 3 need?"),
        ("Is the appendix enlarged?", "Is the appendix non-enlarged?"),
        ("What is this?", "What image is this?"),
        ("A man of 54 has chest pain. What is the diagnosis?", "A man of 54 has chest pain. What is the next step?"),
    ],
)
def test_questions_about_different_things_are_different(one: str, other: str) -> None:
    assert asked(one) != asked(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Does this chest X-ray show pleural effusion?", "Does the chest X-ray show a pleural effusion?"),
        ("Where is the lesion located in this image?", "In this image, where is the lesion?"),
        ("Are pleural effusions present?", "Is there a pleural effusion?"),
        ("Which plane is this image in?", "What plane was the scan taken in?".replace("taken ", "")),
        ("Is there a tumor?", "Is there any tumour here?"),
    ],
)
def test_questions_put_in_other_words_are_the_same(one: str, other: str) -> None:
    assert asked(one) == asked(other)


def test_options_are_the_same_in_any_order_and_another_option_makes_another_question() -> None:
    assert asked("Which organ?", ["the liver", "lung"]) == asked("Which organ?", ["Lung", "liver"])
    assert asked("Which organ?", ["liver", "lung"]) != asked("Which organ?", ["liver", "heart"])


@pytest.mark.parametrize(
    "other",
    [
        REPORT.replace("pleural effusion or pneumothorax", "pneumothorax; a pleural effusion"),
        REPORT.replace("Bones are intact", "Bones are fractured"),
        REPORT.replace("pneumothorax", "pneumonia"),
        REPORT.replace("Bones are intact", "Melanoma is excised"),
        REPORT.replace("There is no pleural effusion", "There may be pleural effusion"),
        REPORT.replace("Bones are intact", "There is a right nodule and a left fracture"),
    ],
)
def test_reports_of_other_findings_state_something_else(other: str) -> None:
    assert stated(REPORT) != stated(other)
    assert stated(REPORT) == stated(REPORT.replace("intact", "unbroken").upper())
    assert stated(REPORT) == stated(" ".join(reversed(REPORT.split(". "))))


def test_sides_belong_to_their_findings() -> None:
    one, other = (f"There is a {a} nodule and a {b} fracture." for a, b in (("right", "left"), ("left", "right")))
    assert stated(one) != stated(other)


# --- real reports -----------------------------------------------------------------------------------------------------

SYNONYMS = {"seen": "visible", "identified": "seen", "evidence": "sign", "lungs": "lung fields", "silhouette": "contour",
            "demonstrate": "show", "visualized": "seen", "within": "in", "heart": "cardiac shadow"}  # fmt: skip


def reworded(text: str, rng: random.Random) -> str:
    """Sentences in another order, up to a tenth of the words exchanged, sometimes other case."""
    sentences = [s for s in re.split(r"(?<=\.)\s+", text) if s]
    rng.shuffle(sentences)
    out, changed = [], 0
    for word in " ".join(sentences).split():
        new = SYNONYMS.get(word.lower().strip(".,"))
        if new and changed < max(1, len(text.split()) // 10) and rng.random() < 0.5:
            word, changed = new + word[len(word.rstrip(".,")) :], changed + 1
        out.append(word)
    return " ".join(out).upper() if rng.random() < 0.2 else " ".join(out)


def test_recall_and_precision_on_re_worded_open_i_reports(shared_data: Path, index: TextIndex) -> None:
    """1,000 reports that are no near duplicates of each other (the hard negatives, half of them variants of one normal
    report), and 300 re-worded ones."""
    path = shared_data / "data" / "openi_reports" / "indiana_reports.csv"
    if not path.is_file():
        pytest.skip("no Open-i reports")
    with path.open() as file:
        reports = [f"{row['findings']} {row['impression']}".strip() for row in csv.DictReader(file)]
    kept: dict[str, str] = {}
    for i, text in enumerate(reports):
        if len(words(text)) >= 12 and index.find_or_add(text, str(i)) is None:
            kept[str(i)] = text
        if len(kept) == 1000:
            break
    rng = random.Random(1)
    found = wrong = 0
    planted = rng.sample(sorted(kept), 300)
    for name in planted:
        match = index.find(reworded(kept[name], rng))
        found += match is not None
        wrong += match is not None and match.owner != name
    assert found / len(planted) >= 0.9
    assert wrong / found <= 0.05  # the copy came nearer to another report than to its own


def test_reports_that_state_the_same_are_found_again_when_reworded(shared_data: Path, tmp_path: Path) -> None:
    """As `dedup_text` compares them: within what they state. 300 Open-i reports, reworded."""
    path = shared_data / "data" / "openi_reports" / "indiana_reports.csv"
    if not path.is_file():
        pytest.skip("no Open-i reports")
    with path.open() as file:
        reports = [f"{row['findings']} {row['impression']}".strip() for row in csv.DictReader(file)]
    index = TextIndex(tmp_path / "stated.sqlite", guard=False)
    kept = {}
    for i, text in enumerate(reports[:900]):
        if len(words(text)) >= 12 and index.find_or_add(text, str(i), stated(text)) is None:
            kept[str(i)] = text
    rng = random.Random(1)
    planted = rng.sample(sorted(kept), 300)
    matches = [index.find(copy, stated(copy)) for copy in (reworded(kept[name], rng) for name in planted)]
    owners = [match.owner if match else None for match in matches]
    assert sum(owner is not None for owner in owners) >= 0.94 * len(planted)
    assert sum(owner not in (None, name) for owner, name in zip(owners, planted, strict=True)) <= 3


def test_short_questions_of_vqa_rad_are_found_again_in_other_punctuation(shared_data: Path, index: TextIndex) -> None:
    import json

    path = shared_data / "data" / "vqa_rad" / "trainset.json"
    if not path.is_file():
        pytest.skip("no VQA-RAD")
    questions = list(dict.fromkeys(row["question"] for row in json.loads(path.read_text())))[:300]
    kept = [q for q in questions if index.find_or_add(q, q) is None]
    assert len(kept) > 200
    assert all(index.find(q.upper().replace("?", " ?")).owner == q for q in kept)

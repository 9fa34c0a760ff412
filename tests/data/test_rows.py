"""Rows become prompts, or are refused with their place and the reason."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lingshu_rl.data.load import SHOWN, ById, DataError, broken_rows, load
from lingshu_rl.data.rows import FIELDS, RowError, instruction_text, row_to_prompt
from lingshu_rl.imaging.images import Budget, Picture
from rewards.kinds import KINDS


def picture(path: Path, level: int = 90) -> Path:
    Image.new("L", (20, 16), level).save(path)
    return path


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "id": "a",
        "images": ["scan.png"],
        "question": "Which plane is this?",
        "options": ["axial", "coronal", "sagittal"],
        "answer": "B",
        "kind": "option",
        "meta": {"modality": "MRI", "patient_id": "p1"},
    }
    return {key: value for key, value in {**good, **changes}.items() if value != "absent"}


def without_options(kind: str, answer: Any, **changes: Any) -> dict[str, Any]:
    return row(kind=kind, answer=answer, options="absent", **changes)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    picture(folder / "scan.png")
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


# --- good rows --------------------------------------------------------------------------------------------------------


def test_prompt_has_images_first_then_one_text_with_question_options_and_instruction(tmp_path: Path) -> None:
    prompt = row_to_prompt(row(images=["scan.png", "other.png"]), base_dir=tmp_path, instruction="short")
    (turn,) = prompt.messages
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
    assert prompt.text == "Which plane is this?\nA. axial\nB. coronal\nC. sagittal\nAnswer: letter."
    assert [p.source for p in prompt.images] == [str(tmp_path / "scan.png"), str(tmp_path / "other.png")]
    assert (prompt.gold, prompt.options, prompt.kind) == ("B", ("axial", "coronal", "sagittal"), "option")


def test_instruction_is_short_full_or_your_own() -> None:
    assert row_to_prompt(row(), instruction="").text.endswith("C. sagittal")
    assert row_to_prompt(row(), instruction="Reply in one word.").text.endswith("\nReply in one word.")
    full = row_to_prompt(row(), instruction="full").text
    assert "<think>" in full and "</answer>" in full and "letter of the correct option" in full
    assert "letters of all correct options" in instruction_text("full", "option", {"multi": True})
    texts = {instruction_text(name, kind) for name in ("short", "full") for kind in ("option", "yesno", "open")}
    assert len(texts) == 6


@pytest.mark.parametrize(
    ("question", "meta", "chinese"),
    [
        ("图像中有胸腔积液吗?", {}, True),
        ("这张 CT 图像是用什么方式拍摄的?", {}, True),
        ("Is there an effusion?", {}, False),
        ("Is there an effusion (胸腔积液)?", {"language": "zh-CN"}, True),
        ("What does 肺 mean in this note?", {}, False),
        ("图像中有胸腔积液吗?", {"language": "en"}, False),
    ],
)
@pytest.mark.parametrize("images", [["scan.png"], []])
@pytest.mark.parametrize("instruction", ["full", "short"])
def test_the_instruction_speaks_the_questions_language_and_of_what_is_there(question, meta, chinese, images, instruction):  # fmt: skip
    made = {"id": "q", "images": images, "question": question, "answer": "yes", "kind": "yesno", "meta": meta}
    told = row_to_prompt(made, instruction=instruction).text.removeprefix(question)
    assert bool(re.search("[\u4e00-\u9fff]", told)) == chinese and bool(re.search("yes or no", told)) == (not chinese)
    if instruction == "full":
        assert ("image" in told or "图像" in told) == bool(images) and "<think>" in told and "</answer>" in told


def test_every_kind_of_the_table_asks_in_chinese_and_an_own_one_in_english_throughout():
    lines = {instruction_text(name, kind, language="zh") for kind in KINDS for name in ("full", "short")}
    assert len(lines) == 2 * len(KINDS) and all(re.search("[\u4e00-\u9fff]", line) for line in lines)
    own = instruction_text("full", "box", {"box_scale": "pixel", "image_size": [9, 9]}, language="zh")
    assert own.isascii() and own.startswith("Think step by step")


def test_unit_and_tolerance_join_the_meta_and_absent_cells_do_not() -> None:
    table_row = without_options(
        "numeric", "140 mm", unit="mm", tolerance={"abs": 4.0, "rel": None}, meta={"organ": "brain", "analyte": None}
    )
    prompt = row_to_prompt(table_row)
    assert prompt.meta == {"organ": "brain", "unit": "mm", "tolerance": {"abs": 4.0}}
    assert prompt.gold == "140 mm"


@pytest.mark.parametrize("answer", ["B", "b", " B ", "coronal", "Coronal"])
def test_option_answers_name_a_letter_or_the_text(answer: str) -> None:
    assert row_to_prompt(row(answer=answer)).gold == "B"


@pytest.mark.parametrize("answer", ["C,A", ["A", "sagittal"], "axial, C"])
def test_several_right_options(answer: Any) -> None:
    assert row_to_prompt(row(answer=answer, meta={"multi": True})).gold == "A,C"


@pytest.mark.parametrize(("answer", "gold"), [("Yes", "yes"), (" no ", "no"), (True, "yes"), ("False", "no")])
def test_yesno_answers_are_normalised(answer: Any, gold: str) -> None:
    assert row_to_prompt(without_options("yesno", answer)).gold == gold


def test_images_come_as_paths_bytes_or_pictures(tmp_path: Path) -> None:
    path = picture(tmp_path / "scan.png", level=77)
    data = path.read_bytes()
    given = [str(path), data, {"bytes": data, "path": "scan.png"}, {"bytes": None, "path": str(path)}, Image.open(path)]
    pictures = row_to_prompt(row(images=given), budget=Budget(min_pixels=1)).images
    assert [p.source for p in pictures[:4]] == [str(path), data, data, str(path)]
    for picture_ in pictures:
        assert picture_.fault() is None and picture_.size == (20, 16)
        assert picture_.pixels().getpixel((3, 3)) == (77, 77, 77)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_cut_off_or_broken_image_is_unreadable(format: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(buffer, format=format)
    whole = buffer.getvalue()
    assert Picture(whole).fault() is None
    for broken in (whole[: len(whole) // 2], whole[:20], b"no image", b""):
        assert "unreadable image of" in str(Picture(broken).fault())


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_images_are_refused_because_rgb_would_turn_them_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "deep.tif"
    Image.new(mode, (8, 8), 4000).save(path)
    assert "over 8 bits" in str(Picture(str(path)).fault_in_header())


def test_a_row_without_an_image_says_so_with_an_empty_list() -> None:
    assert row_to_prompt(row(images=[])).images == ()


# --- bad rows ---------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "missing field": (row(question="absent"), "'question' is missing"),
    "missing images": (row(images="absent"), r"'images' is missing.*use \[\]"),
    "null answer": (row(answer=None), "'answer' is missing"),
    "nan answer": (row(answer=float("nan")), "'answer' is missing"),
    "empty question": (row(question="  "), "question must be a non-empty text"),
    "empty answer": (without_options("open", " "), "answer is empty"),
    "empty id": (row(id=" "), "id must be"),
    "misspelt field": (row(option=["x"]), "unknown field 'option'.*did you mean 'options'"),
    "unknown kind": (row(kind="optoin"), "unknown kind 'optoin'.*did you mean 'option'"),
    "answer outside": (row(answer="D"), "'D' is outside the 3 options"),
    "answer text outside": (row(answer="oblique"), "'oblique' is neither one letter nor the text"),
    "answer of two readings": (row(options=["B", "A"], answer="A"), "both a letter and the text of option B"),
    "option answer is a number": (row(answer=1), "neither one letter nor the text"),
    "no options": (row(options="absent"), "at least two options, got 0"),
    "one option": (row(options=["axial"], answer="A"), "at least two options, got 1"),
    "same option twice": (row(options=["axial", "Axial"], answer="A"), "stands twice"),
    "empty option": (row(options=["axial", ""], answer="A"), "every option must be"),
    "options on another kind": (row(kind="open", answer="x"), "options belong to kind 'option'"),
    "unit on another kind": (row(unit="mm"), "'unit' belongs to kind 'numeric'"),
    "yesno answer": (without_options("yesno", "maybe"), "must be yes or no"),
    "numeric answer": (without_options("numeric", ["1"]), "a list is a label for range"),
    "open answer": (without_options("open", [3]), "no list of texts"),
    "tolerance form": (without_options("numeric", "3", tolerance=0.1), "tolerance must be a mapping"),
    "tolerance name": (without_options("numeric", "3", tolerance={"relative": 0.1}), "unknown tolerance 'relative'"),
    "tolerance value": (without_options("numeric", "3", tolerance={"abs": -1}), "'abs' cannot be -1"),
    "two units": (without_options("numeric", "3 mm", unit="mm", meta={"unit": "cm"}), "'unit' stands"),
    "images as text": (row(images="scan.png"), "images must be a list"),
    "image address": (row(images=["https://example.org/a.png"]), "not addresses"),
    "image of another type": (row(images=[3]), "an image must be a path, bytes or a PIL image"),
    "meta as text": (row(meta="MRI"), "meta must be a mapping"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_with_the_reason(name: str) -> None:
    bad, reason = BAD_ROWS[name]
    with pytest.raises(RowError, match=reason):
        row_to_prompt(bad)


def test_every_bad_line_is_listed_with_its_number_id_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path, [row(), row(id="b", images=["gone.png"]), row(), row(id="c", images=["cut.png"])])
    (tmp_path / "cut.png").write_bytes((tmp_path / "scan.png").read_bytes()[:50])
    path.write_text(path.read_text() + '{"id": "d",\n\n[1]\n')
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "5 of 6 rows cannot be used" in message and "data.skip_bad_rows=true" in message
    assert [bad.place for bad in caught.value.refused] == ["line 2", "line 3", "line 4", "line 5", "line 7"]
    for expected in (
        f"line 2 (id b): image file not found: {tmp_path / 'gone.png'}",
        "line 3 (id a): duplicate id, first used at line 1",
        "line 4 (id c): unreadable image",
        "line 5: not JSON",
        "line 7: a line holds one JSON object, this one a list",
    ):
        assert expected in message


def test_a_long_list_is_cut_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [row(id=str(n), kind="quiz") for n in range(SHOWN + 5)] + [row(id="good")])
    with pytest.raises(DataError, match=r"(?s)25 of 26 rows.*\.\.\. and 5 more") as caught:
        load(path)
    assert len(caught.value.refused) == SHOWN + 5
    assert str(caught.value).count("unknown kind") == SHOWN


def test_skipping_bad_rows_returns_and_logs_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, [row(), row(id="b", answer="Z")])
    with caplog.at_level(logging.WARNING):
        loaded = load(path, skip_bad_rows=True)
    assert [prompt.id for prompt in loaded.prompts] == ["a"]
    assert [(bad.place, bad.id) for bad in loaded.refused] == [("line 2", "b")]
    assert "1 of 2 rows cannot be used" in caplog.text and "line 2 (id b)" in caplog.text


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No usable row is left"):
        load(write(tmp_path, [row(kind="quiz")]), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: write(d, []), "the source is empty"),
        (lambda d: d / "gone.jsonl", "no such file"),
        (lambda d: write(d, [row()], "rows.pkl"), "a pickle runs code"),
        (lambda d: write(d, [row()], "rows.xlsx"), "a source is demo:train, a .jsonl"),
        (lambda d: write(d, [row()], "rows.parquet"), "not a readable parquet file"),
        (lambda d: "demo:tset", "splits train, validation, test"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, make: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(make(tmp_path))


# --- the same rows from everywhere ------------------------------------------------------------------------------------


def many(folder: Path) -> list[dict[str, Any]]:
    rows = [
        row(),
        without_options("numeric", "140 mm", id="b", unit="mm", tolerance={"abs": 4.0}),
        without_options("yesno", "yes", id="c", meta={"organ": "brain"}),
    ]
    for n, r in enumerate(rows):
        r["images"] = [str(picture(folder / f"{n}.png", level=40 * n).name)]
    return rows


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [r.get(name) for r in rows] for name in FIELDS}


def test_jsonl_parquet_and_rows_in_memory_give_equal_prompts(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = many(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table(columns_of(rows)), tmp_path / "rows.parquet")
    from_jsonl = load(write(tmp_path, rows)).prompts
    assert len(from_jsonl) == 3
    assert load(tmp_path / "rows.parquet").prompts == from_jsonl
    assert load(rows, base_dir=tmp_path).prompts == from_jsonl


def test_a_hugging_face_folder_gives_equal_prompts_with_the_same_pixels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = many(tmp_path)
    from_jsonl = load(write(tmp_path, rows)).prompts
    table = columns_of(rows)
    table["images"] = [[str(tmp_path / path) for path in paths] for paths in table["images"]]
    data = datasets.Dataset.from_dict(table).cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    loaded = load(f"{tmp_path / 'saved'}:train").prompts
    for ours, theirs in zip(from_jsonl, loaded, strict=True):
        assert replace(ours, images=()) == replace(theirs, images=())
        assert (Path(str(ours.images[0].source)).read_bytes(),) == tuple(p.source for p in theirs.images)
    with pytest.raises(DataError, match="name one of its splits, train, after a colon"):
        load(tmp_path / "saved")


def test_importing_the_data_package_loads_no_torch() -> None:
    code = "import sys, lingshu_rl.data, lingshu_rl.data.load, lingshu_rl.data.rows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- large sets -------------------------------------------------------------------------------------------------------


def sources(folder: Path, count: int) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    rows = [without_options("open", f"finding {n}", id=f"r{n}", images=[]) for n in range(count)]
    pyarrow.parquet.write_table(pyarrow.table(columns_of(rows)), folder / "rows.parquet", row_group_size=7)
    return [write(folder, rows), folder / "rows.parquet"]


def test_prompts_are_made_when_asked_for_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        "lingshu_rl.data.load.row_to_prompt", lambda r, **more: made.append(r["id"]) or row_to_prompt(r, **more)
    )
    for source in sources(tmp_path, 1000):
        made.clear()
        prompts = load(source).prompts
        assert len(made) == 1000  # once each: without images nothing is looked at again
        made.clear()
        alive = [weakref.ref(prompts[n]) for n in range(1000)]
        assert len(made) == 1000 and sum(ref() is not None for ref in alive) < 500
        assert prompts[999].gold == "finding 999" and prompts[-2].id == "r998" and len(prompts) == 1000
        assert [p.id for p in prompts[3:5]] == ["r3", "r4"] and prompts.by_id("r7") == prompts[7]
        with pytest.raises(IndexError):
            prompts[1000]
        with pytest.raises(KeyError):
            prompts.by_id("r1000")


def test_two_sets_by_id(tmp_path: Path) -> None:
    jsonl, parquet = (load(source).prompts for source in sources(tmp_path, 3))
    other = load([without_options("yesno", "yes", id="z", images=[])]).prompts
    both = ById(parquet, other)
    assert len(both) == 4 and list(both) == ["r0", "r1", "r2", "z"] and "y" not in both
    assert both["z"] == other[0] and both["r1"] == jsonl[1]
    with pytest.raises(KeyError):
        both["y"]


def test_a_file_that_is_written_over_is_named_and_one_that_is_replaced_does_no_harm(tmp_path: Path) -> None:
    path = sources(tmp_path, 400)[0]
    prompts = load(path).prompts
    path.rename(tmp_path / "old.jsonl")
    path.write_text("gone")
    assert prompts[1].id == "r1"
    (tmp_path / "old.jsonl").write_text("gone")
    with pytest.raises(DataError, match=r"line 3 has changed since it was loaded: not JSON"):
        prompts[2]


def test_only_headers_are_read_of_many_images_and_a_broken_one_is_found_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [picture(tmp_path / f"{n}.png", level=n) for n in range(4)]
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[: len(whole) - 30])
    path = write(tmp_path, [row(id=f"r{n}", images=[str(file)]) for n, file in enumerate([*files, files[2]])])
    with pytest.raises(DataError, match="2 of 5 rows"):
        load(path)
    monkeypatch.setattr("lingshu_rl.data.load.DECODED_AT_LOAD", 3)
    loaded = load(path)
    assert len(loaded.prompts) == 5
    found = list(broken_rows(loaded.prompts))
    assert [(bad.place, bad.id) for bad in found] == [("line 3", "r2"), ("line 5", "r4")]
    assert "unreadable image" in found[0].reason
    files[0].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1 \(id r0\): unreadable image"):
        load(path)


def test_equal_rows_have_equal_fingerprints_and_others_do_not(tmp_path: Path) -> None:
    rows = many(tmp_path)
    first = load(write(tmp_path, rows)).fingerprint
    assert load(write(tmp_path, rows, "copy.jsonl")).fingerprint == first
    moved = tmp_path / "moved"
    moved.mkdir()
    assert load(write(moved, many(moved))).fingerprint == first
    picture(tmp_path / "1.png", level=9).write_bytes((tmp_path / "1.png").read_bytes() + b"more")
    seen = {first, load(tmp_path / "copy.jsonl").fingerprint}
    for change in ({"answer": "A"}, {"question": "Why?"}, {"id": "x"}, {"meta": {"organ": "knee"}}):
        seen.add(load(write(moved, [{**rows[0], **change}, *rows[1:]])).fingerprint)
    seen.add(load(write(moved, rows[::-1])).fingerprint)
    seen.add(load(write(moved, rows[:2])).fingerprint)
    seen.add(load(write(moved, rows), instruction="short").fingerprint)
    assert len(seen) == 9

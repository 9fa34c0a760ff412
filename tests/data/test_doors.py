"""A row is accepted or refused alike wherever it comes in, and an own kind goes through all of it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lingshu_rl.curate.readers import Source, read_rows
from lingshu_rl.data.load import DataError, load
from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.eval.rescore import rescore
from lingshu_rl.planning.given import load_config
from lingshu_rl.report.html import findings
from lingshu_rl.rewarding import reward_of
from rewards.preflight import main

ROOT = Path(__file__).resolve().parents[2]
SIDES = ["left", "right"]

# (what the row is like, what it has beside id, images and question, is it usable)
OPTIONS: list[tuple[str, dict[str, Any], bool]] = [
    ("options_mapping", {"options": {"A": "left", "B": "right"}, "answer": "B"}, True),
    ("mapping with an empty letter", {"options": {"A": "left", "B": "right", "C": None}, "answer": "B"}, True),
    ("mapping with a gap", {"options": {"A": "left", "C": "right"}, "answer": "A"}, False),
    ("letter_and_text", {"options": SIDES, "answer": "B. right"}, True),
    ("letter and text with a bracket", {"options": SIDES, "answer": "B) right"}, True),
    ("letter in brackets", {"options": SIDES, "answer": "(B)"}, True),
    ("letter and another's text", {"options": SIDES, "answer": "B. left"}, False),
    ("lettered options", {"options": ["A. left", "B. right"], "answer": "right"}, True),
    ("lettered options out of order", {"options": ["B. left", "A. right"], "answer": "left"}, False),
    ("text of an option", {"options": SIDES, "answer": "right"}, True),
    ("two options for one", {"options": SIDES, "answer": "left, right"}, False),
    ("several right ones", {"options": SIDES, "answer": ["A", "right"], "meta": {"multi": True}}, True),
    ("a list without multi", {"options": SIDES, "answer": ["A", "B"]}, False),
    ("letter outside", {"options": SIDES, "answer": "C"}, False),
    ("option said twice after its letters are off", {"options": ["A. left", "B. left"], "answer": "A"}, False),
]
OTHERS: list[tuple[str, dict[str, Any], bool]] = [
    ("Korean yes", {"kind": "yesno", "answer": "예"}, True),
    ("Korean no", {"kind": "yesno", "answer": "아니요."}, True),
    ("German no", {"kind": "yesno", "answer": "Nein"}, True),
    ("a truth", {"kind": "yesno", "answer": True}, True),
    ("perhaps", {"kind": "yesno", "answer": "perhaps"}, False),
    ("accepted answers", {"kind": "open", "answer": ["lung", "pulmo"]}, True),
    ("a box without its reward", {"kind": "open", "answer": [60, 30, 90, 50]}, False),
    ("a pair", {"kind": "numeric", "answer": [120, 80], "unit": "mmHg", "meta": {"kind": "pair"}}, True),
    ("a range", {"kind": "numeric", "answer": [3, 5], "unit": "cm", "meta": {"kind": "range"}}, True),
    ("a range upside down", {"kind": "numeric", "answer": [5, 3], "unit": "cm", "meta": {"kind": "range"}}, False),
    ("two numbers of no sort", {"kind": "numeric", "answer": [5, 3]}, False),
    ("a number that is none", {"kind": "numeric", "answer": "large"}, False),
    ("an unknown unit", {"kind": "numeric", "answer": 3, "unit": "parsnips"}, False),
    ("a kind of no module", {"kind": "no_such_module:BOX", "answer": "x"}, False),
    ("no answer", {"kind": "open"}, False),
    ("own box", {"kind": "custom_reward:BOX", "answer": [60, 30, 90, 50]}, True),
    ("own box upside down", {"kind": "custom_reward:BOX", "answer": [60, 90, 90, 50]}, False),
]
ROWS = {name: ({"kind": "option", **row}, usable) for name, row, usable in (*OPTIONS, *OTHERS)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("L", (20, 16), 90).save(tmp_path / "scan.png")
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def whole(row: dict[str, Any], name: str = "a") -> dict[str, Any]:
    return {"id": name, "images": ["scan.png"], "question": "On which half lies the mark?", **row}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def raises(error: type[Exception], work) -> bool:
    try:
        work()
    except error:
        return True
    return False


def verdicts(folder: Path, row: dict[str, Any]) -> dict[str, bool]:
    file = write(folder / "rows.jsonl", [row])
    outputs = write(folder / "outputs.jsonl", [{**row, "completion": "<answer>x</answer>"}])
    main(["check", str(file), "--out", "report.json"])
    told = json.loads((folder / "report.json").read_text())
    return {
        "check": not told["bad"] and not told["refused"],
        "load": not raises(DataError, lambda: load(file)),
        "curate": all(record.row is not None for record in read_rows(Source(str(file)))),
        "evaluate": not raises(EvalError, lambda: rescore(outputs)),
    }


@pytest.mark.parametrize("name", ROWS)
def test_all_doors_say_the_same(folder, name):
    row, usable = ROWS[name]
    assert verdicts(folder, whole(row)) == dict.fromkeys(("check", "load", "curate", "evaluate"), usable)


@pytest.mark.parametrize(
    ("given", "ours"),
    [("image", "images"), ("choices", "options"), ("label", "answer"), ("prompt", "question"), ("solution", "answer"), ("type", "kind"), ("optoins", "options")],
)  # fmt: skip
def test_names_of_other_projects_are_answered_with_ours(folder, given, ours):
    row = whole({"kind": "option", "options": SIDES, "answer": "B"})
    row[given] = row.pop(ours)
    file = write(folder / "rows.jsonl", [row])
    with pytest.raises(DataError, match=f"unknown field '{given}' .did you mean '{ours}'"):
        load(file)
    main(["check", str(file), "--out", "report.json"])
    assert f"did you mean '{ours}'" in json.loads((folder / "report.json").read_text())["refused"][0]


def test_options_lose_their_letters_once_and_the_label_is_a_letter(folder):
    rows = [whole({"kind": "option", "options": ["A. left", "B. right"], "answer": "B) right"})]
    (prompt,) = load(write(folder / "rows.jsonl", rows)).prompts
    assert prompt.options == ("left", "right") and prompt.gold == "B"
    assert "A. left\nB. right\n" in prompt.text


def test_the_check_is_that_of_the_runs_own_reward(folder):
    """Boxes under a kind of this library: the run's spec says who judges them."""
    rows = [whole({"kind": "open", "answer": box}, str(i)) for i, box in enumerate(([6, 3, 9, 5], [5, 6, 4, 10]))]
    file = write(folder / "rows.jsonl", rows)
    config = load_config(None, ['rewards.spec={route: {open: {class: "custom_reward:BoxIoU"}}}'])
    with pytest.raises(DataError, match="2 of 2 rows"):
        load(file)
    loaded = load(file, check=reward_of(config.rewards.spec).check_gold, skip_bad_rows=True)
    assert [p.gold for p in loaded.prompts] == [[6, 3, 9, 5]]
    assert loaded.refused[0].reason == "the label is not a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2"


def test_a_check_that_raises_refuses_the_row(folder):
    config = load_config(None, ['rewards.spec={route: {open: {class: "custom_reward:BoxIoU"}}}'])
    with pytest.raises(DataError, match="cannot check the label 5: TypeError"):
        load(
            write(folder / "rows.jsonl", [whole({"kind": "open", "answer": 5})]),
            check=reward_of(config.rewards.spec).check_gold,
        )


def test_an_own_kind_goes_from_the_check_to_the_report(folder, capsys):
    boxes = [[60, 30, 90, 50], [5, 60, 40, 100], [20, 5, 50, 25]]
    rows = [whole({"kind": "custom_reward:BOX", "answer": box}, f"b{i}") for i, box in enumerate(boxes)]
    file = write(folder / "boxes.jsonl", rows)
    assert main(["check", str(file)]) == 0
    assert "the whole image" in capsys.readouterr().out
    prompts = load(file).prompts
    assert prompts[0].text.endswith("The final answer is the box as [x1, y1, x2, y2] in pixels.")
    from lingshu_rl.progress import Progress
    from lingshu_rl.rewarding import build_rewards

    rewards = build_rewards(
        load_config(None, [f"data.train={file}", f"data.test={file}", "data.instruction=full"]),
        prompts,
        Progress(quiet=True),
    )
    try:
        said = [p.reward_input("<think>.</think><answer>[60, 30, 90, 50]</answer>") for p in prompts]
        results = asyncio.run(rewards.score(said))
    finally:
        rewards.close()
    assert [result.value for result in results] == [1.0, 0.0, 0.0]
    assert results[0].components["answer/custom_reward:BOX/overlap"] == 1.0
    stored = {
        "kind": prompts[0].kind,
        "gold": "[60, 30, 90, 50]",
        "parsed": json.dumps(results[0].parsed),
        "value": 1.0,
    }
    assert findings(stored)[0]["text"].startswith("said [60.0, 30.0, 90.0, 50.0]")


def test_the_readmes_reward_passes_its_own_check(tmp_path, monkeypatch):
    """Found from the working folder, as an author starts it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text[text.index("## An own reward") :].split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "readme_reward.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    rows = [{"id": i, "images": [], "question": "Which side?", "answer": side, "kind": "open"} for i, side in enumerate(SIDES)]  # fmt: skip
    assert main(["check", str(write(tmp_path / "rows.jsonl", rows)), "--reward", "readme_reward:Laterality"]) == 0

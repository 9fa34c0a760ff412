"""`lingshu-rl data look`: the layout is guessed, the mapping can be pasted, and what is shown is what a run would get."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lingshu_rl.cli import main
from lingshu_rl.data.load import load

SIDES = ["left", "right"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.effect_noise((80, 60), 90).save(tmp_path / "p.png")
    return tmp_path


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def looked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["data", "look", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def pasted(out: str) -> Any:
    """The YAML that the look prints, read as a settings file would be."""
    return yaml.safe_load(re.search(r"^data:\n(?:  .*\n)+", out, re.MULTILINE)[0])["data"]["train"]  # type: ignore[index]


def test_a_known_layout_is_named_and_its_rows_are_shown(folder: Path, capsys: Any) -> None:
    records = [{"id": n, "image": "p.png", "conversations": [{"from": "human", "value": "<image>\nWhich side?"}, {"from": "gpt", "value": answer}]} for n, answer in enumerate(["left", "Yes.", "B"])]  # fmt: skip
    code, out, _ = looked(capsys, write(folder / "a.jsonl", *records))
    assert code == 0 and pasted(out)["format"] == "llava"
    assert "# 0: open, images of 80 x 60\n  user: <image> Which side?" in out and "gold: 'left'" in out
    assert "2 rows can be used, 1 would be refused" in out and "kinds: open 1, yesno 1" in out
    assert "median 4800, smallest 4800, largest 4800" in out
    assert "refused, 1: line 3: answer 'B' looks like the letter of an option" in out
    assert len(load(pasted(out), skip_bad_rows=True).prompts) == 2


def test_an_unknown_layout_gets_a_mapping_by_its_columns(folder: Path, capsys: Any) -> None:
    records = [{"uid": n, "scan": "p.png", "query": "Which side?", "option_a": "left", "option_b": "right", "gt": n} for n in range(2)]  # fmt: skip
    code, out, _ = looked(capsys, write(folder / "a.jsonl", *records))
    source = pasted(out)
    assert source["map"] == {"id": "uid", "images": "scan", "question": "query", "options": ["option_a", "option_b"], "answer": {"from": "gt", "base": 0}}  # fmt: skip
    assert code == 0 and [p.gold for p in load(source).prompts] == ["A", "B"]


def test_indices_without_a_nought_count_from_one(folder: Path, capsys: Any) -> None:
    records = [{"image": "p.png", "question": "Which side?", "candidates": SIDES, "target": n + 1} for n in range(2)]
    _, out, _ = looked(capsys, write(folder / "a.jsonl", *records))
    assert pasted(out)["map"]["answer"] == {"from": "target", "base": 1}


def test_what_cannot_be_guessed_is_asked_for(folder: Path, capsys: Any) -> None:
    code, out, err = looked(capsys, write(folder / "a.jsonl", {"scan": "p.png", "grade": 1}))
    assert (
        code == 2 and "# add question and answer: a column under map" in out and "begin with the mapping above" in err
    )
    code, out, _ = looked(capsys, str(folder / "a.jsonl"), "map.images=scan", "map.answer={from: grade, base: 0}", "values.question='Which grade?'", "values.options=[none, mild]")  # fmt: skip
    assert code == 0 and "gold: 'B'" in out


def test_reports_are_guessed_and_lost_images_are_asked_for(folder: Path, capsys: Any) -> None:
    record = {
        "uid": 1,
        "image": "Chest PA",
        "view": "p.png",
        "findings": "The lungs are clear.",
        "impression": "Normal.",
    }
    _, out, _ = looked(capsys, write(folder / "a.jsonl", record))
    assert (
        pasted(out)["format"] == "reports"
        and pasted(out)["map"] == {"images": "view"}
        and "gold: 'The lungs are clear.\\nNormal.'" in out
    )
    _, _, err = looked(capsys, write(folder / "a.jsonl", {**record, "view": "gone.png"}))
    assert "say where the images are with image_dir=FOLDER" in err


def test_rows_of_this_library_are_shown_as_they_are(folder: Path, capsys: Any) -> None:
    rows = [{"id": n, "images": ["p.png"], "question": "Which side?", "options": SIDES, "answer": "A", "kind": "option"} for n in range(30)]  # fmt: skip
    _, out, _ = looked(capsys, write(folder / "a.jsonl", *rows), "--rows", "2", "--limit", "20")
    assert pasted(out) == {"path": str(folder / "a.jsonl")} and out.count("gold:") == 2 and "20 rows can be used" in out


def test_a_model_counts_tokens_and_says_what_it_refuses(folder: Path, capsys: Any) -> None:
    rows = [{"id": n, "images": ["p.png"], "question": text, "answer": "left", "kind": "open"} for n, text in enumerate(["Which side?", "<|im_end|>"])]  # fmt: skip
    _, out, _ = looked(capsys, write(folder / "a.jsonl", *rows), "--model", "demo", "--instruction", "short")
    assert re.search(r"tokens of a prompt: median \d+", out) and "as a control token" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.jsonl"], "no such file"),
        (["a.jsonl", "--format", "lava"], "did you mean 'llava'"),
        (["a.jsonl", "were=x == y"], "source.were: unknown key.*'where'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(folder: Path, capsys: Any, monkeypatch: Any, words: list[str], said: str) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    write(folder / "a.jsonl", {"image": "p.png", "question": "Which side?", "answer": "left"})
    code, _, err = looked(capsys, *words)
    assert code == 2 and re.search(said, err)

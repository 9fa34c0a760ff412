"""Other people's layouts come in at every door by the same words: training, the labels' check, synthesis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_layouts import LAYOUTS, PNG, write

from lingshu_rl.cli import main
from lingshu_rl.data.load import load

CHOICES = [
    "medbullets.csv",
    "medqa.jsonl",
    "pmc_vqa_test.csv",
    "medxpertqa_list.jsonl",
    "aokvqa.json",
]
OTHERS = [
    "cmb_single.json",
    "vqa_rad.json",
    "openlifescience.parquet",
    "medcalc_weeks.csv",
    "mmmu_open.parquet",
    "rows.csv.bz2",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.png").write_bytes(PNG)
    return tmp_path


@pytest.mark.parametrize("name", [*CHOICES, *OTHERS])
def test_labels_are_checked_as_they_are_trained_on(folder, capsys, name):
    content, told, _ = LAYOUTS[name]
    file = write(folder / name, content)
    prompt = load({"path": str(file), **told}).prompts[0]
    words = [f"{key}={value}" for key, value in told.items()]
    code = main(["rewards", "check", str(file), *words, "--out", str(folder / "r.json")])
    report = json.loads((folder / "r.json").read_text())
    assert not report["refused"] and not report["bad"] and code == 0, capsys.readouterr()
    assert prompt.kind in {probe["kind"] for probe in report["probes"]}


def test_what_cannot_be_read_so_is_said(folder, capsys):
    file = write(folder / "medqa.jsonl", LAYOUTS["medqa.jsonl"][0])
    assert main(["rewards", "check", str(file), "format=medqua"]) == 2
    assert "did you mean 'medqa'" in capsys.readouterr().err
    assert main(["rewards", "check", str(file), "formt=medqa"]) == 2
    assert "formt: unknown key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["rewards", "check", str(file), "--formt", "medqa"])


@pytest.mark.parametrize("name", CHOICES)
def test_synthesis_takes_presets(folder, name):
    """An option question that stands without its options becomes open; its answer is the right option's text."""
    content, told, _ = LAYOUTS[name]
    text = content.replace("Which organ is shown?", "What is the name of the organ?")
    file = write(folder / name, text)
    words = [
        "synth",
        "rewrite",
        str(file),
        "--out",
        str(folder / "o.jsonl"),
        "--to",
        "open",
        "--format",
        told["format"],
    ]
    assert main(words) == 0
    (row,) = map(json.loads, (folder / "o.jsonl").read_text().splitlines())
    assert row["answer"] == "liver" and row["kind"] == "open" and "options" not in row
    assert load(folder / "o.jsonl").prompts[0].gold == "liver"


def test_records_that_are_no_rows_are_dropped_with_their_reason(folder):
    rows = [
        {"question": "What is the name of it?", "options": {"A": "liver", "B": "kidney"}, "answer_idx": "A"},
        {"question": "What is it?", "options": {"A": "x", "C": "y"}, "answer_idx": "A"},
    ]
    file = write(folder / "m.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert main(["synth", "rewrite", str(file), "--out", str(folder / "o.jsonl"), "--to", "open", "format=medqa"]) == 0
    (dropped,) = map(json.loads, (folder / "o.dropped.jsonl").read_text().splitlines())
    assert dropped["reason"] == "not a usable row" and "without a gap" in dropped["detail"]

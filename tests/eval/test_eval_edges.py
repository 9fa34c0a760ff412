"""What outputs and answers hold at the edges: lines that are none, controls without an answer, a reader that has enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from lingshu_rl.cli import main
from lingshu_rl.eval.compare import compare
from lingshu_rl.eval.engines import FileEngine
from lingshu_rl.eval.rescore import rescore
from lingshu_rl.eval.scoring import summarise_conditions
from lingshu_rl.eval.tables import score_table

BREAKS = "\u2028\u2029\u0085\x0b\x0c\x1c"  # what str.splitlines takes for the end of a line, and a file does not


@pytest.mark.parametrize("count", [1, 2])
def test_a_text_with_line_separators_is_one_line(tmp_path, count):
    rows = [{"id": f"q{n}", "question": f"Is it there?{BREAKS}", "answer": "yes", "kind": "yesno", "completion": f"So{BREAKS}<answer>yes</answer>", "value": 1.0, "image": ""} for n in range(count)]  # fmt: skip
    file = tmp_path / "o.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    assert [reply.text for reply in FileEngine(file).found.values()] == [r["completion"] for r in rows]
    assert compare(file, file)["benchmarks"]["o"]["first"]["n"] == count
    assert rescore(file)["all"]["n"] == count


def test_a_broken_line_is_named(tmp_path, capsys):
    (tmp_path / "o.jsonl").write_text('{"id": "a", "value": 1.0}\n\n{"id": "b"\n')
    assert main(["eval", "compare", str(tmp_path / "o.jsonl"), str(tmp_path / "o.jsonl")]) == 2
    assert "o.jsonl, line 3: not JSON" in capsys.readouterr().err


def row(name: str, value: float | None) -> dict:
    status = "engine_error" if value is None else "ok"
    return {"id": name, "kind": "yesno", "value": value, "status": status, "image": name}


def test_a_control_that_was_never_answered_is_neither_beaten_nor_not():
    main_rows = [row(str(n), 1.0) for n in range(20)]
    conditions = {"main": main_rows, "blank": [row(str(n), None) for n in range(20)], "majority": [row(str(n), 1.0) for n in range(20)], "text_only": [row(str(n), 0.0) for n in range(20)]}  # fmt: skip
    scores = summarise_conditions(conditions)
    assert {name: found["above"]["beaten"] for name, found in scores["controls"].items()} == {"blank": None, "majority": False, "text_only": True}  # fmt: skip
    assert scores["not_beaten"] == ["majority"]
    header, line = score_table({"benchmarks": {"vqa_rad": {**scores, "tried": "own"}}})
    shown = dict(zip(header, line, strict=True))
    assert shown["blank image"] == "n/a" and "†" in shown["majority"] and "†" not in shown["text only"]


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """`lingshu-rl eval --list | head -1` and the like."""
    command = f"{sys.executable} -m lingshu_rl.cli eval --list | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=Path(ROOT))  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr

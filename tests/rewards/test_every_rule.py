"""Every rule of the short answers has a case, and the cases at the edges come out as written."""

import subprocess
import sys
from pathlib import Path

import every_rule
import pytest

from rewards import build

EDGES = [row for row in every_rule.rows() if row["id"].startswith("edge")]


@pytest.mark.parametrize("row", EDGES, ids=lambda row: row["id"])
def test_edge(row):
    reward = build({"class": every_rule.CLASSES[row["kind"]], "args": row.get("args", {})})
    result = reward.score(every_rule.sample_of(row))
    assert result.value == pytest.approx(row["value"]) and result.status == row["status"], (row["output"], result)


@pytest.mark.slow
def test_every_branch_of_the_rules_is_noticed_by_a_case():
    """In a process of its own: the modules are compiled anew."""
    ran = subprocess.run([sys.executable, every_rule.__file__], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "", "add a case to tests/rewards/cases_*.jsonl, or delete the rule"


@pytest.mark.slow
def test_a_rule_without_a_case_is_named(tmp_path):
    """The same run over a folder that has no case of a label set."""
    for file in Path(every_rule.__file__).parent.glob("cases_*.jsonl"):
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if '"labels"' not in line]
        (tmp_path / file.name).write_text("" if file.stem == "cases_labels" else "\n".join(kept), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, every_rule.__file__, "--cases", str(tmp_path), "labels"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "labels:" in ran.stdout, ran.stderr

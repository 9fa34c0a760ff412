"""The table of false payments and false refusals counts what it says it counts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rewards.base import RewardInput


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "benchmarks" / "rewards.py"
    spec = importlib.util.spec_from_file_location("rewards_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.MEASURED_S = 0.01
    return module


def test_wrong_verdicts_are_told_apart(bench):
    def case(name, output, expected):
        return bench.Case(name, (RewardInput(output, gold="B"),), expected)

    cases = [case("a", "1", 1.0), case("b", "0", 1.0), case("c", "1", 0.0), case("d", "0.5", 0.0), case("e", "x", 1.0)]
    line = bench.measure("r", "f", cases, lambda s: None if s.completion == "x" else float(s.completion))
    assert (line.rows, line.false_payments, line.false_refusals) == (5, 2, 2)
    assert line.wrong_ids == ("c", "d", "b", "e") and line.scores_per_s > 0


def test_reports_are_judged_by_their_order(bench):
    def pair(name, good, bad, relation):
        return bench.Case(name, (RewardInput(str(good), gold=""), RewardInput(str(bad), gold="")), relation)

    cases = [
        pair("same pay for worse", 0.5, 0.5, "good>bad"),
        pair("better", 0.6, 0.5, "good>bad"),
        pair("other words", 1.0, 0.8, "good==bad"),
        pair("close enough", 1.0, 0.95, "good==bad"),
        pair("worse paid more", 0.5, 0.6, "good>=bad"),
        pair("as good", 0.5, 0.52, "good>=bad"),
    ]
    line = bench.measure("r", "f", cases, lambda s: float(s.completion))
    assert line.wrong_ids == ("same pay for worse", "worse paid more", "other words")
    assert (line.false_payments, line.false_refusals) == (2, 1)


def test_the_command_writes_table_and_figures(bench, tmp_path, capsys):
    rows = [
        {"id": "1", "output": "<answer>B</answer>", "options": ["CT", "MRI"], "gold": "B", "expected_reward": 1.0},
        {"id": "2", "output": "A or B", "options": ["CT", "MRI"], "gold": "B", "expected_reward": 0.0},
        {
            "id": "3",
            "output": "?",
            "options": ["CT", "MRI"],
            "gold": "B",
            "expected_reward": 1.0,
            "policy_dependent": True,
        },
    ]
    (tmp_path / "cases_option.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bench.main(["--cases", str(tmp_path), "--out", str(tmp_path / "out" / "figures.json")]) == 0
    assert "| OptionLetter | cases_option.jsonl | 2 | 0 | 0 |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["lines"][0]["reward"] == "OptionLetter" and figures["processor"]
    assert bench.main(["--cases", str(tmp_path / "out")]) == 2


def test_numeric_cases_carry_their_label_into_meta(bench):
    row = {
        "id": "n", "output": "5 mg", "gold": 5, "gold_unit": "mg", "gold_kind": "scalar", "tolerance": {"rel": 0.1},
        "analyte": None, "expected_reward": 1.0, "meta": {"x": 1},
    }  # fmt: skip
    sample = bench._case(row, "numeric").samples[0]
    assert sample.meta == {"x": 1, "unit": "mg", "kind": "scalar", "tolerance": {"rel": 0.1}}

"""Chest radiographs and CT: texts in the order that a radiologist would give them, written before any was scored."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from rewards import RewardInput
from rewards.report import ReportEntities, extract, load

CASES = [
    json.loads(line) for line in (Path(__file__).parent / "cases_report_order.jsonl").read_text("utf-8").splitlines()
]
REWARD = ReportEntities()
FLOOR = 0.05  # below it texts that meet nothing of the reference are hardly told apart


def pay(text: str, reference: str) -> float:
    value = REWARD.score(RewardInput(text, gold=reference, kind="report")).value
    assert value is not None
    return value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_better_reports_earn_more(case):
    values = [pay(text, case["reference"]) for text in case["ordered"]]
    assert pay(case["reference"], case["reference"]) == 1.0
    assert all(a > b or (max(a, b) < FLOOR and a >= b - 0.01) for a, b in pairwise(values)), values
    assert values[0] > 0.4 and values[0] > values[-1] + 0.3, values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion, normal heart.", {"-pleural_effusion", "-heart"}),
        ("Without pneumothorax, unremarkable mediastinum, clear lungs.", {"-pneumothorax", "-mediastinum", "-lung"}),
        ("No mass, free fluid, or air.", {"-mass", "-ascites"}),  # a finding whose name begins like a normal word
        ("No nodule, mass, effusion.", {"-nodule", "-mass", "-pleural_effusion"}),
        ("Nodule, malignancy suspected.", {"nodule", "?cancer"}),
        ("Left effusion, pneumonia possible.", {"pleural_effusion", "?pneumonia"}),
        ("Effusion, edema and pneumonia suspected.", {"?pleural_effusion", "?edema", "?pneumonia"}),
        ("Pneumonia, suspected.", {"?pneumonia"}),
    ],
)
def test_a_list_item_that_is_told_of_is_neither_denied_nor_doubted(text, expected):
    signs = {"present": "", "absent": "-", "uncertain": "?"}
    assert {signs[e.assertion] + e.finding for e in extract(text, load()).entities} == expected

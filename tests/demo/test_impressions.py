"""Impressions of real reports: whole, short, apart, and measured by more than the reward that pays them."""

from __future__ import annotations

import importlib.util
import json

import pytest

from lingshu_rl.demo import impressions
from rewards import ReportEntities, RewardInput, default_reward
from rewards.preflight import check
from rewards.rows import read_row


def report(findings: str, impression: str = "Mild cardiomegaly.") -> dict[str, str]:
    return {"id": "r", "FINDINGS": findings, "IMPRESSION": impression}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (report("The heart is mildly enlarged."), True),
        (report("The XXXX is mildly enlarged."), False),
        (report("The heart is mildly enlarged.", "No change from XXXX."), False),
        (report("", "Normal."), False),
        (report("word " * 61), False),
    ],
)
def test_a_report_is_used_when_both_parts_are_short_and_whole(found, expected):
    assert impressions.usable(found) is expected


def test_findings_in_other_order_or_punctuation_are_the_same_report():
    first = report("Heart size is normal. The lungs are clear. No pleural effusion.")
    copies = [
        report("The lungs are clear; heart size is normal. No pleural effusion."),
        report("There is a right effusion."),
    ]
    assert [kept["FINDINGS"] for kept in impressions.apart([first, *copies])] == [
        first["FINDINGS"],
        "There is a right effusion.",
    ]


def graded(path, answers):
    gold = ["Mild cardiomegaly.", "Right pleural effusion.", "Left lower lobe atelectasis."]
    reward = ReportEntities()
    rows = []
    for n, (wanted, answer) in enumerate(zip(gold, answers, strict=True)):
        value = reward.score(RewardInput(completion=answer, gold=wanted)).value
        rows.append({"id": str(n), "gold": wanted, "completion": answer, "value": value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return path


def test_measures_pair_the_stages_by_question_and_see_what_the_reward_sees(tmp_path):
    nothing = graded(tmp_path / "a.jsonl", ["No acute disease."] * 3)
    right = graded(
        tmp_path / "b.jsonl", ["Mild cardiomegaly.", "Right pleural effusion.", "Left lower lobe atelectasis."]
    )
    head, _, before, after = impressions.measures({"before": nothing, "after": right}).splitlines()
    assert head.count("|") == before.count("|") == after.count("|") == 6
    assert "| 100.0, +100.0 (+100.0 to +100.0) | 100.0, +100.0 (+100.0 to +100.0) |" in after
    other = tmp_path / "c.jsonl"
    other.write_text(json.dumps({"id": "9", "gold": "x", "completion": "y", "value": 1.0}) + "\n")
    with pytest.raises(ValueError, match="same questions"):
        impressions.measures({"before": nothing, "other": other})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchxrayvision") is None, reason="needs the reports: make demo-text")
def test_the_rows_of_the_real_reports_can_be_judged_and_do_not_overlap():
    rows = impressions.rows()
    assert len(rows["train"]) > 300 and len(rows["test"]) == 200
    assert not {row["id"] for row in rows["train"]} & {row["id"] for row in rows["test"]}
    for split in rows.values():
        assert sum(row["meta"]["task"] == "a finding" for row in split) == len(split) / 2
        assert check([read_row(row).sample for row in split], default_reward()).ok

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import LabelSet, OpenAnswer, RewardInput, YesNo

HERE = Path(__file__).parent
REWARDS = {"yesno": YesNo(), "open": OpenAnswer(), "labels": LabelSet()}
ROWS = {
    kind: [json.loads(line) for line in (HERE / f"cases_{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
    for kind in REWARDS
}
LABELS = ["Edema", "Pleural effusion"]


@pytest.mark.parametrize(("kind", "row"), [pytest.param(k, row, id=row["id"]) for k in ROWS for row in ROWS[k]])
def test_own_case(kind, row):
    result = REWARDS[kind].score(RewardInput(row["output"], row["gold"], prompt=row.get("question", "")))
    assert result.value == pytest.approx(row["expected_reward"]), (row["output"], result.parsed, result.reason)


def score(reward, completion, gold, truncated=False, **meta):
    return reward.score(RewardInput(completion, gold, truncated=truncated, meta=meta))


@pytest.mark.parametrize("gold", ["yes", "Yes.", "YES", "true", True, "예", "sí"])
def test_gold_yes(gold):
    assert YesNo().check_gold(RewardInput("", gold)) is None
    assert score(YesNo(), "<answer>yes</answer>", gold).value == 1.0
    assert score(YesNo(), "<answer>no</answer>", gold).value == 0.0


@pytest.mark.parametrize("gold", ["maybe", "", None, 1, "yes or no", ["yes"]])
def test_gold_that_is_neither_is_masked(gold):
    assert "OptionLetter" in YesNo().check_gold(RewardInput("", gold))
    result = score(YesNo(), "yes", gold)
    assert (result.value, result.status) == (None, "gold_invalid")


def test_a_cut_yes_is_no_answer():
    assert score(YesNo(), "Yes, there is", "yes", truncated=True).status == "truncated"
    assert score(YesNo(), "<answer>yes</answer> Th", "yes", truncated=True).value == 1.0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_judged(text):
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "left lung"), (LabelSet(), ["edema", "effusion"])):
        result = score(reward, text, gold)
        assert result.value is not None and result == score(reward, text, gold)


def test_synonyms_are_a_list_or_a_mapping():
    said = "<answer>blocked coronary</answer>"
    assert score(OpenAnswer(), said, "myocardial infarction").value == 0.0
    assert score(OpenAnswer(), said, "myocardial infarction", synonyms=["blocked coronary", "MI"]).value == 1.0
    mapping = {"Myocardial infarction": ["blocked coronaries"], "Stroke": ["brain attack"]}
    assert score(OpenAnswer(), said, "myocardial infarction", synonyms=mapping).value == 1.0
    assert score(OpenAnswer(), "<answer>brain attack</answer>", "myocardial infarction", synonyms=mapping).value == 0.0
    assert score(OpenAnswer(), said, ["blocked coronary", "MI"]).value == 1.0


@pytest.mark.parametrize("gold", ["", " ", None, True, [], ["a", ""], {"a": 1}, "?!"])
def test_open_gold_that_cannot_be_judged(gold):
    assert OpenAnswer().check_gold(RewardInput("", gold))
    assert score(OpenAnswer(), "<answer>x</answer>", gold).value is None


def test_naming_every_label_does_not_pay():
    every = ", ".join(["edema", "pleural effusion", *(f"finding {n}" for n in range(12))])
    assert score(LabelSet(), f"<answer>{every}</answer>", LABELS).value == 0.0
    assert score(LabelSet(wrong_cost=0), f"<answer>{every}</answer>", LABELS).value == pytest.approx(4 / 16)


@pytest.mark.parametrize(("completion", "value"), [("none", 1.0), ("[]", 1.0), ("<answer>No finding</answer>", 1.0)])
def test_an_empty_label_set_has_to_be_said(completion, value):
    assert score(LabelSet(), completion, []).value == value
    assert score(LabelSet(), "", []).value == 0.0
    assert score(LabelSet(), "<answer>edema</answer>", []).value == 0.0


def test_label_synonyms_and_gold():
    assert score(LabelSet(), "<answer>hydrothorax, edema</answer>", LABELS).value < 1.0
    synonyms = {"Pleural effusion": ["hydrothorax"]}
    assert score(LabelSet(), "<answer>hydrothorax, edema</answer>", LABELS, synonyms=synonyms).value == 1.0
    assert score(LabelSet(), "<answer>edema; pleural effusion</answer>", "Edema, Pleural effusion").value == 1.0
    for gold in (None, 3, ["edema", "Edema"], ["edema", ""], [1]):
        assert LabelSet().check_gold(RewardInput("", gold))
        assert score(LabelSet(), "edema", gold).value is None
    with pytest.raises(ValueError, match="wrong_cost"):
        LabelSet(wrong_cost=-1)


@pytest.mark.parametrize(
    "unit", ["yes, ", "no ", "yes. ", "so ", "a, ", "(a) ", "½1", "答案是B", "and ", "< ", "B\n", "the "]
)
def test_hostile_text_is_read_in_linear_time(unit):
    text = unit * (20_000 // len(unit))
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "left lung"), (LabelSet(), ["edema"])):
        for completion in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
            best = min(_cpu_seconds(reward, completion, gold) for _ in range(2))
            assert best < 0.25, f"{reward.name}: {best:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(reward, completion, gold):
    start = time.process_time()
    score(reward, completion, gold)
    return time.process_time() - start


def test_a_label_set_that_cannot_be_earned_is_named():
    assert "cannot be earned" in LabelSet().check_gold(RewardInput("", ["edema because of failure"]))

"""Yes/no questions answered by a sentence: what it says, or that it says neither, and then nothing may be paid.

The first rows were written from the questions' side before the rules were read, those from said071 on
against them, from the view of what looks alike.
"""

import json
from pathlib import Path

import pytest

from rewards import RewardInput, YesNo

ROWS = [json.loads(line) for line in (Path(__file__).parent / "cases_sentences.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_sentence_is_paid_for_what_it_says_and_for_nothing_else(row):
    def is_paid(gold):
        return YesNo().score(RewardInput(row["output"], gold, prompt=row["question"])).value == 1.0

    assert [gold for gold in ("yes", "no") if is_paid(gold)] == [row["says"]] * bool(row["says"]), row

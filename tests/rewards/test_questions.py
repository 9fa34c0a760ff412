"""A sentence answers a question that it restates, word by word; anything else says neither yes nor no."""

import time

import pytest

from rewards import OpenAnswer, RewardInput, YesNo

FRACTURE = "Is there a fracture?"


def test_a_missing_question_is_named():
    result = YesNo().score(RewardInput("The heart is enlarged.", "yes"))
    assert "question" in result.reason


@pytest.mark.parametrize(
    "unit", ["the heart is ", "no ", "and ", "of ", "fracture, ", "is not ", "The heart is enlarged. "]
)
def test_hostile_sentences_are_read_in_linear_time(unit):
    text = unit * (20_000 // len(unit))
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "fracture")):
        for completion in (text, f"<answer>{text}</answer>"):
            sample = RewardInput(completion, gold, prompt=FRACTURE)
            best = min(_cpu_seconds(reward, sample) for _ in range(2))
            assert best < 0.25, f"{reward.name}: {best:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(reward, sample):
    start = time.process_time()
    reward.score(sample)
    return time.process_time() - start

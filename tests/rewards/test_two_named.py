"""An announcing word that is itself an answer is one: whoever names two answers is not paid for the second."""

import pytest

from rewards import LabelSet, OpenAnswer, OptionLetter, RewardInput

SIDES = ("left", "right")


@pytest.mark.parametrize(
    ("options", "gold", "answer", "value"),
    [
        (SIDES, "A", "right, left", 0),
        (SIDES, "A", "right; left", 0),
        (SIDES, "A", "both: right, left", 0),
        (("left", "right", "midline"), "C", "right; midline", 0),
        (("correct", "incorrect"), "B", "correct; incorrect", 0),
        (("yes", "no", "maybe"), "B", "maybe; no", 0),
        (("likely", "unlikely"), "B", "likely; unlikely", 0),
        (SIDES, "A", "The right answer is left", 1),
        (SIDES, "B", "right, B", 1),
        (("yes", "no"), "A", "No doubt, yes", 1),
        (("CT", "MRI"), "A", "likely CT", 1),
    ],
)
def test_a_second_option_is_not_what_the_first_announces(options, gold, answer, value):
    sample = RewardInput(f"<answer>{answer}</answer>", gold, options=options, kind="option")
    assert OptionLetter().score(sample).value == value


@pytest.mark.parametrize(("gold", "value"), [("A,C", 0), ("A,B", 1)])
def test_a_set_holds_the_option_that_also_announces(gold, value):
    answer = "left; right; midline" if gold == "A,C" else "right, left"
    sample = RewardInput(f"<answer>{answer}</answer>", gold, options=("left", "right", "midline"), meta={"multi": True})
    assert OptionLetter().score(sample).value == value


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("left", "right, left", 0),
        ("lung", "right lung", 0),
        ("lungs", "both lungs", 0),
        ("left", "The right answer is left", 1),
        ("pneumonia", "likely pneumonia", 1),
    ],
)
def test_a_free_answer_keeps_the_word_that_describes_it(gold, answer, value):
    assert OpenAnswer().score(RewardInput(f"<answer>{answer}</answer>", gold, kind="open")).value == value
    if value == 0:
        assert LabelSet().score(RewardInput(f"<answer>{answer}</answer>", [gold])).value < 1

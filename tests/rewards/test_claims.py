"""The stances of a claim, the same for every short-answer reward: wordings around a value x, and around another one y."""

import pytest

from rewards import LabelSet, NumericUnits, OpenAnswer, OptionLetter, RewardInput, YesNo

NOT_PAID = {
    "retracted in a tag": "<answer>{x}. Wait, actually {y}</answer>",
    "retracted in prose": "The answer is {x}. Wait, no, it is {y}.",
    "retracted after a tag": "<answer>{x}</answer>\nCorrection: the answer is {y}.",
    "retracted for nothing": "The answer is {x}. Scratch that.",
    "retracted on reflection": "The answer is {x}. On reflection, {y}.",
    "doubted": "I doubt that the answer is {x}.",
    "not thought": "I don't think that the answer is {x}.",
    "doubted in a tag": "<answer>{x}, but I doubt it</answer>",
    "hearsay": "Some would say {x}.",
    "hearsay of many": "Many would answer {x}.",
    "hearsay before a cue": "My colleague claims that the answer is {x}.",
    "once thought": "I used to think that the answer was {x}.",
    "a temptation": "It would be tempting to answer {x}.",
    "conditional before": "If the film were rotated, the answer would be {x}.",
    "conditional behind": "<answer>{x} if the film is rotated, otherwise {y}</answer>",
    "supposed": "Suppose the answer is {x}.",
    "asked": "Is the answer {x}?",
    "asked in a tag": "<answer>{x}?</answer>",
    "open": "<answer>{x} or {y}</answer>",
    "undecided": "<answer>{x} or {y} cannot be decided</answer>",
    "undecided in prose": "I cannot decide between {x} and {y}.",
    "denied": "The answer is not {x}.",
    "denied behind": "{x} is not the answer.",
    "denied for another": "{y} rather than {x}",
    "called wrong": "<answer>{x} is wrong</answer>",
    "hedged": "The answer is {x}, or perhaps {y}.",
}
PAID = {
    "subject": "{x} is the answer",
    "subject with an adjective": "{x} is the correct answer.",
    "preferred": "{x} rather than {y}",
    "preferred in a tag": "<answer>{x} rather than {y}</answer>",
    "not the other": "<answer>{x}, not {y}</answer>",
    "likely": "{x} (most likely)",
    "likely in a tag": "<answer>{x} (most likely)</answer>",
    "likely before": "<answer>Most likely {x}</answer>",
    "own view": "I would say {x}.",
    "own view with a cue": "I think the answer is {x}.",
    "without doubt": "Without a doubt, the answer is {x}.",
    "cue": "So the final answer is: **{x}**.",
    "with a reason": "<answer>{x}, because the film shows it</answer>",
    "retracted for the right one": "<answer>{y}. Wait, actually {x}</answer>",
}
REWARDS = {
    "option": (OptionLetter(), "B", "C", "B", ("Sarcoidosis", "Tuberculosis", "Silicosis", "Lymphoma")),
    "yesno": (YesNo(), "yes", "no", "yes", ()),
    "numeric": (NumericUnits(), "5 mg", "7 mg", "5 mg", ()),
    "open": (OpenAnswer(), "pneumonia", "sarcoidosis", "Pneumonia", ()),
    "labels": (LabelSet(), "edema", "fracture", ["Edema"], ()),
}


GOLD_OF_Y = {"option": "C", "yesno": "no", "numeric": "7 mg", "open": "sarcoidosis", "labels": ["Fracture"]}
SAYS_Y = (
    "retracted in a tag",
    "retracted in prose",
    "retracted after a tag",
    "retracted on reflection",
    "denied for another",
)


def paid(kind, wording, other=False):
    reward, x, y, gold, options = REWARDS[kind]
    gold = GOLD_OF_Y[kind] if other else gold
    text = wording.format(x=x, y=y)
    return reward.score(RewardInput(text[:1].upper() + text[1:], gold, options))


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("wording", NOT_PAID)
def test_what_is_not_asserted_is_not_paid(wording, kind):
    result = paid(kind, NOT_PAID[wording])
    assert result.value == 0.0
    assert result.reason


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("wording", PAID)
def test_what_is_asserted_is_paid(wording, kind):
    result = paid(kind, PAID[wording])
    assert result.value == 1.0, result.reason


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("wording", [name for name in NOT_PAID | PAID if name not in SAYS_Y])
def test_what_is_mentioned_beside_is_not_paid(wording, kind):
    assert paid(kind, (NOT_PAID | PAID)[wording], other=True).value == 0.0


@pytest.mark.parametrize("kind", REWARDS)
def test_closed_reads_marked_answers_and_nothing_but_the_answer(kind):
    own, x, y, gold, options = REWARDS[kind]
    reward = type(own)(read="closed")

    def value(text, truncated=False):
        return reward.score(RewardInput(text, gold, options, truncated=truncated)).value

    for text in (f"<answer>{x}</answer>", f"So \\boxed{{{x}}}", f'{{"answer": "{x}"}}', x):
        assert value(text) == 1.0, text
    for text in (f"The answer is {x}.", f"The film is clear.\n{x}", f"<answer>{y}</answer>", y):
        assert value(text) == 0.0, text
    assert value(f"The answer is {y}. <answer>{x}</answer>") == 0.0, "prose may still veto"
    assert value(x, truncated=True) == 0.0
    with pytest.raises(ValueError, match="closed"):
        type(own)(read="loose")

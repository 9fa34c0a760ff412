"""An answer that is given and then taken back, or left open beside another: every mark, every way, every kind."""

import itertools
import re

import pytest

from rewards import LabelSet, NumericUnits, OpenAnswer, OptionLetter, RewardInput, YesNo

GIVEN = {
    "tag": "<answer>{x}</answer>",
    "tag with a full stop": "<answer>{x}.</answer>",
    "box": r"\boxed{{{x}}}",
    "json": '{{"answer": "{x}"}}',
    "cue": "The answer is {x}.",
    "line": "{x}.",
}
TAKEN_BACK = {
    "another, not it": " The answer is {y}, not {x}.",
    "another with a stray full stop, not it": " The answer is {y}., not {x}.",
    "another in a line, not it": "\nThe answer is {y}, not {x}.",
    "another in a line with a stray full stop": "\nThe answer is {y}., not {x}.",
    "another instead": " The answer is {y} instead of {x}.",
    "it is not": " The answer is not {x} but {y}.",
    "wait": " Wait, no, it is {y}.",
    "correction": "\nCorrection: {y}.",
    "a sentence of correction": " Correction: the answer is {y}.",
    "sorry": " Sorry, I meant {y}.",
    "second thought": " On second thought, {y}.",
    "second thought as a sentence": " On second thought, the answer is {y}.",
    "no": " No, it is {y}.",
    "scratch": " Scratch that, {y}.",
    "actually": " Actually, it is {y}.",
    "actually bare": "\nActually {y}.",
    "changed mind": " I have changed my mind: {y}.",
    "called wrong": " That is wrong. The answer is {y}.",
    "should be": " That should be {y}.",
    "revised": "\nRevised answer: {y}.",
    "no, the answer": "\nNo, the answer is {y}.",
    "mistaken": " I was wrong, it is {y}.",
    "called wrong, nothing else": "\nThat is wrong.",
    "scratch, nothing else": " Scratch that.",
    "mistaken, nothing else": "\nI was wrong.",
    "denied": " However, it is not.",
    "denied in short": "\nBut it isn't.",
}
LEFT_OPEN = {
    "alternatively": ", alternatively {y}",
    "alternatively, a sentence": " Alternatively, {y}.",
    "alternatively in a line": "\nAlternatively: {y}",
    "or": " or {y}",
    "or maybe": " or maybe {y}",
    "or possibly": ", or possibly {y}.",
    "or in brackets": " (or {y})",
    "or else": ", or else {y}",
    "and/or": " and/or {y}",
    "versus": " versus {y}",
    "either": " It is either {x} or {y}.",
    "could also be": " It could also be {y}.",
    "also possible": " The answer could also be {y}.",
    "maybe": " Maybe {y}.",
    "perhaps": "; perhaps {y}",
    "also an answer": " {y} is also a correct answer.",
    "or in a line": "\nOr {y}.",
}
# Behind an answer with a mark of its own.
BESIDE_A_MARK = (
    " Let me reconsider. The answer is {y}.",
    " But wait, {y} fits better.",
    " Final answer: {y}",
    " My final choice is {y}.",
    " EDIT: {y}",
    "\nUpdate: {y}",
    " That was a typo, {y} is right.",
    " Please disregard that; the answer is {y}.",
    " Ignore the above. {y}.",
    " In fact, {y}.",
    " In fact, it is {y}.",
    " The correct answer is {y}.",
    " {y} is more likely.",
    " - or {y}",
    " (alternative: {y})",
    " An alternative is {y}.",
    " Another possibility is {y}.",
    " {y} cannot be excluded.",
    " Otherwise {y}.",
    " and {y}",
    " & {y}",
    "; {y}",
    ", {y}",
    " / {y}",
    " | {y}",
    " -> {y}",
    " Well, no: {y}.",
    " Hmm, {y}.",
    " Hmm, I think it is {y}.",
    " However, the answer is {y}.",
    " But it may be {y}.",
    " It might be {y}.",
    " Or should it be {y}?",
    " I retract this: {y}.",
    " I withdraw that answer. It is {y}.",
    " That is not right. It is {y}.",
    " Not {x} but {y}.",
    " Not {x}, {y}.",
    " {y} instead of {x}.",
    " Rather {y}.",
    " Better: {y}.",
    " {x} is wrong, {y} is right.",
    " {y}, not {x}.",
    " Oh no, {y}.",
    " My mistake, {y}.",
    " Apologies, it is {y}.",
    " I misspoke: {y}.",
    " Looking again, it is {y}.",
    " After more thought, {y}.",
    " Upon further review, the answer is {y}.",
    " Changed to {y}.",
    " Or, {y}.",
    " Or: {y}",
    " Alternative answer: {y}",
    " Second answer: {y}",
    " Possible answer: {y}",
    " Possibly {y} instead.",
    " {x} or {y}.",
    " One of {x} and {y}.",
    " Both {x} and {y}.",
    " Between {x} and {y}.",
)
# What may stand behind an answer without taking anything from it.
EXPLAINED = (
    " Another one was ruled out.",
    "\nThe film was read twice.",
    " This is likely, as the film shows.",
    " I am sure.",
    " But a second look may be wise.",
    "\nExplanation: it was seen on all films, and no doubt is left.",
    " See the report.",
    " It is {x}.",
    " {x} it is, not {y}.",
    " {y} is wrong.",
    " {y} can be excluded.",
    " So the answer is {x}, and not {y}.",
    " Both lungs are affected.",
    " In fact, the film is clear.",
    " Either way, rest is advised.",
    " But the film shows little.",
    " Another film was taken.",
    " However, the patient was well.",
    " {y} is less likely.",
    " The alternative was considered and rejected.",
    " I first thought of {y}, but the film shows {x}.",
)
# One sentence that names an answer and then says that it is none.
CONCEDED = (
    "{x} seems correct but is not.",
    "{x} seems correct, but it is not.",
    "{x} looks right but that is wrong.",
    "{x} would be my guess, although it isn't.",
    "{x} appears right, yet that's incorrect.",
    "{x} is right, but this is not true.",
    "{x} may look right; it is not.",
    "{x} but that is wrong",
    "{x}, although it isn't.",
    "{x}, yet that's incorrect.",
    "{x}, though this is false",
    "{x}, but not really.",
    "{x} seems right at first but isn't.",
    "{x} might seem like the answer, however it is incorrect.",
    "The answer seems to be {x} but is not.",
    "It looks like {x} but it is not.",
    "{x} (but that is wrong)",
    "{x} seems plausible but is incorrect.",
    "At first glance {x}, but no.",
    "While {x} seems right, it is not.",
    "Although {x} seems correct, it is wrong.",
    "{x} only seems correct.",
)
# What takes the first answer back and gives another one: {0} and {1} are marked.
REPLACED = ("Scratch that.", "Correction:", "I was wrong.", "Wait, no.", "That is incorrect.", "I made a mistake.")
MARKS = ("tag", "tag with a full stop", "box", "json")
KINDS = {
    "option": (OptionLetter(), {"options": ("left lung", "right lung", "both", "neither")}, [("A", "A"), ("D", "D")]),
    "option text": (
        OptionLetter(),
        {"options": ("sarcoidosis", "silicosis", "lymphoma")},
        [("sarcoidosis", "A"), ("lymphoma", "C")],
    ),
    "number": (NumericUnits(), {"meta": {"unit": "cm"}}, [("120 cm", 120), ("60 cm", 60)]),
    "plain number": (NumericUnits(), {}, [("17", 17), ("12", 12)]),
    "yesno": (YesNo(), {}, [("yes", "yes"), ("no", "no")]),
    "noyes": (YesNo(), {}, [("no", "no"), ("yes", "yes")]),
    "open": (OpenAnswer(), {}, [("pneumonia", "pneumonia"), ("sarcoidosis", "sarcoidosis")]),
    "labels": (LabelSet(), {}, [("edema", ["Edema"]), ("fracture", ["Fracture"])]),
}


def _sentence(then: str, x: str, y: str) -> str:
    begins = re.match(r"\s+\{[xy]\}", then)  # with a capital letter
    text = then.format(x=x, y=y)
    return text if begins is None else begins.group()[:-3] + text.lstrip()[:1].upper() + text.lstrip()[1:]


def values(kind: str, given: str, then: str) -> list[float | None]:
    """What the completion earns under the label that it names first, and under the other one."""
    reward, row, ((x, gold), (y, other)) = KINDS[kind]
    text = (given if then[:1] in " \n" else given.rstrip(".")).format(x=x) + _sentence(then, x, y)
    return [reward.score(RewardInput(text, label, **row)).value for label in (gold, other)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", TAKEN_BACK)
def test_what_is_taken_back_is_not_paid(kind, way):
    assert [given for given in GIVEN if values(kind, GIVEN[given], TAKEN_BACK[way])[0] == 1.0] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", LEFT_OPEN)
def test_what_is_left_open_is_paid_under_no_label(kind, way):
    assert [given for given in GIVEN if 1.0 in values(kind, GIVEN[given], LEFT_OPEN[way])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("then", BESIDE_A_MARK)
def test_a_marked_answer_is_not_paid_where_another_is_named_behind_it(kind, then):
    assert [mark for mark in MARKS if values(kind, GIVEN[mark], then)[0] == 1.0] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wording", CONCEDED)
def test_what_its_own_sentence_denies_is_not_paid(kind, wording):
    assert values(kind, "<answer>{x}</answer>", "\n")[0] == 1.0
    for text in (wording, f"<answer>{wording}</answer>"):
        assert values(kind, text, "\n")[0] == 0.0, text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", REPLACED)
@pytest.mark.parametrize("first", MARKS)
@pytest.mark.parametrize("joint", [" ", "\n"])
@pytest.mark.parametrize("second", ["<answer>{y}</answer>", r"\boxed{{{y}}}", "The answer is {y}."])
def test_an_answer_that_is_taken_back_leaves_the_one_behind_it(kind, between, first, joint, second):
    assert values(kind, GIVEN[first], f"{joint}{between} {second}")[0] == 0.0
    if between != "Correction:" or "answer is" not in second:
        assert values(kind, GIVEN[first], f"{joint}{between} {second}")[1] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["", *EXPLAINED])
def test_what_stands_is_paid(kind, way):
    marks = MARKS if way else GIVEN
    assert [given for given in marks if values(kind, GIVEN[given], way or "\n")[0] != 1.0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_fields_of_an_object_leave_its_answer(kind):
    assert values(kind, '{{"answer": "{x}", "confidence": 0.9, "seen": "twice", "reason": "it fits"}}', "\n")[0] == 1.0


def test_no_way_is_in_both_tables():
    assert not set(map(str.strip, TAKEN_BACK.values())) & set(map(str.strip, LEFT_OPEN.values()))


if __name__ == "__main__":  # the table of what is paid
    for kind, (way, then), (mark, given) in itertools.product(KINDS, (TAKEN_BACK | LEFT_OPEN).items(), GIVEN.items()):
        x, y = values(kind, given, then)
        if x == 1.0 or (y == 1.0 and way in LEFT_OPEN):
            print(f"{kind:12} {way:32} {mark:22} {x} {y}")

"""Hostile completions: what every reward does with texts made to slow it down, to raise in it, or to be paid twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from rewards import LabelSet, NumericUnits, OptionLetter, ReportEntities, RewardInput
from rewards.compose import own_reward

LENGTH = 5000  # characters, about a completion's longest
# A hostile text may cost this many times what ordinary prose of its length does; 20 ms on an idle core.
MOST_TIMES = 8
PROSE = (
    "The film was taken in two views. The heart is of normal size, and the lungs are clear; no effusion or mass is seen. "
    "I first thought of the left lung, but the right lung shows an opacity of 2.5 cm near the hilum. So it is benign. "
)
OPTIONS = ("left lung", "right lung", "both", "neither")
PIECES = (
    "→",
    "⇒",
    "(",
    "[",
    "{",
    "((",
    "<answer>",
    "</answer>",
    r"\boxed{",
    "A",
    "A. ",
    "A→",
    "B or ",
    "not ",
    "no ",
    "1",
    "9" * 50,
    "1,",
    "1.",
    "1/",
    "1e",
    "e\u0301",
    "\u0300",
    "z\u0336",
    "左",
    "右→",
    "不",
    "。",
    "？",
    "、",
    "-",
    "--",
    "|",
    "\n",
    "\n\n",
    " ",
    "\t",
    "*",
    "**",
    "_",
    "`",
    '"',
    "'",
    '{"answer":',
    "answer is ",
    "the answer is A",
    "A, not B, ",
    "if ",
    "wait, ",
    "actually ",
    "120 cm ",
    "cm",
    "mg/dL ",
    "±",
    "to ",
    "yes ",
    "no, ",
    "maybe ",
    "effusion ",
    "no effusion, ",
    "left ",
    "right-sided ",
    "\u202e",
    "\u200b",
    "İ",
    "ß",
    "ﬁ",
    "①",
    "Ⅳ",
    "½",
    "٣",
    "0",
    "00",
    "%",
    "^",
    "$",
    "\\frac{1}{2}",
    "&",
    ";",
    ":",
    "1:",
    "no. ",
    "or it could also be ",
    ", not ",
)

SAMPLES: dict[str, tuple[Callable[[], object], dict]] = {
    "option": (OptionLetter, {"gold": "A", "options": OPTIONS, "kind": "option"}),
    "options": (OptionLetter, {"gold": "A,C", "options": OPTIONS, "kind": "option", "meta": {"multi": True}}),
    "numeric": (NumericUnits, {"gold": 120, "kind": "numeric", "meta": {"unit": "cm", "tolerance": {"rel": 0.05}}}),
    "date": (NumericUnits, {"gold": "2021-03-05", "kind": "numeric", "meta": {"kind": "date"}}),
    "report": (ReportEntities, {"gold": "Small left pleural effusion. No pneumothorax.", "kind": "report"}),
    "yesno": (lambda: own_reward("yesno"), {"gold": "yes", "kind": "yesno", "prompt": "Is there a left effusion?"}),
    "open": (lambda: own_reward("open"), {"gold": "pleural effusion", "kind": "open", "prompt": "What is seen?"}),
    "labels": (LabelSet, {"gold": ["Edema", "Mass"], "kind": "open"}),
}


def texts(mixed: int, seed: int) -> dict[str, str]:
    """Each piece over and over, in the open and where an answer stands; and pairs of them, by turns."""
    rng = random.Random(seed)
    made = {repr(piece): piece * (LENGTH // len(piece)) for piece in PIECES}
    for _ in range(mixed):
        chosen = rng.sample(PIECES, rng.choice((2, 3)))
        made[" + ".join(map(repr, chosen))] = "".join(chosen) * (LENGTH // len("".join(chosen)))
    for _ in range(mixed):
        chosen = [rng.choice(PIECES) for _ in range(400)]
        made[f"mixed {len(made)}"] = "".join(chosen)[:LENGTH]
    return made | {f"tagged {name}": f"<answer>{text}</answer>" for name, text in made.items()}


def seconds(reward, sample) -> float:
    began = time.process_time()
    reward.score(sample)
    return time.process_time() - began


def times_of_prose(reward, sample) -> float:
    """What a sample costs over what prose costs the option reward right before, of the best of five tries."""
    prose = RewardInput(f"<answer>{(PROSE * 30)[:LENGTH]}</answer>", **SAMPLES["option"][1])
    ratios: list[float] = []
    while not ratios or (min(ratios) > MOST_TIMES and len(ratios) < 5):
        usual = seconds(ORDINARY, prose)
        ratios.append(seconds(reward, sample) / max(usual, 1e-4))
    return min(ratios)


ORDINARY = OptionLetter()


def slow_texts(name: str, mixed: int, seed: int) -> dict[str, float]:
    """The texts that cost more than they may, and how many times the cost of prose."""
    make, fields = SAMPLES[name]
    reward = make()
    reward.score(RewardInput("<answer>A</answer>", **fields))  # tables are read once
    times = {told: times_of_prose(reward, RewardInput(text, **fields)) for told, text in texts(mixed, seed).items()}
    return {told: round(times, 1) for told, times in times.items() if times > MOST_TIMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_no_text_of_a_completions_length_takes_long_or_raises(name):
    assert slow_texts(name, 20, 5) == {}


@pytest.mark.endurance
@pytest.mark.parametrize("name", SAMPLES)
def test_thousands_of_mixtures_take_no_longer(name):
    assert slow_texts(name, 1000, 17) == {}


NUMBER = SAMPLES["numeric"][1] | {"gold": 120}
OTHER = SAMPLES["numeric"][1] | {"gold": 60}
A, D = SAMPLES["option"][1], SAMPLES["option"][1] | {"gold": "D"}
# A completion that names two answers, with the labels that it would be paid under.
DOUBLE = [
    ("<answer>120 cm</answer> or 60.0 cm", NumericUnits, NUMBER, OTHER),
    ("<answer>120 cm</answer> or maybe 60 cm", NumericUnits, NUMBER, OTHER),
    ("<answer>60 cm</answer> or 1.2 m", NumericUnits, NUMBER, OTHER),
    ("<answer>A</answer> The answer is D, not A.", OptionLetter, A, D),
    ("<answer>A</answer> or D", OptionLetter, A, D),
    ("<answer>A</answer> Correction: it is D., not A.", OptionLetter, A, D),
    ("<answer>120 cm</answer>, alternatively 60 cm", NumericUnits, NUMBER, OTHER),
    ("<answer>A</answer> The answer is D., not A.", OptionLetter, A, D),
    ("<answer>A.</answer>\nThe answer is D., not A.", OptionLetter, A, D),
    (r"\boxed{A} The answer is D., not A.", OptionLetter, A, D),
]


@pytest.mark.parametrize(("text", "make", "first", "second"), DOUBLE)
def test_a_completion_is_paid_under_one_label_at_most_and_the_retracted_one_under_none(text, make, first, second):
    paid = [make().score(RewardInput(text, **fields)).value for fields in (first, second)]
    assert paid.count(1.0) == 0 or (paid[0] in (0.0, None) and paid[1] == 1.0), paid


WORDS = """
the heart is enlarged nor not no without absent and or of in by a an it film shows seen left 3 but maybe rather
either both one wait sorry correction cannot be excluded fits better ( ) , . ; : ? yes A D 120 cm effusion
<answer> </answer>
"""


@pytest.mark.parametrize("name", SAMPLES)
def test_no_order_of_the_words_around_answers_raises(name):
    make, fields = SAMPLES[name]
    reward, rng = make(), random.Random(11)
    questions = ("Is the heart enlarged?", "Is there a mass and effusion in the left lung?", "Can it be seen?", "")
    for _ in range(400):
        text = " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 25)))
        reward.score(RewardInput(text, **(fields | {"prompt": rng.choice(questions)})))

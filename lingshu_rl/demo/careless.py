"""Labels of a careless annotator, for the policy's warm start: half of them name the class beside the right one.

A policy tuned on such labels has learnt the format and what to look at, but gives both classes about the same
probability. That is the state from which verifiable rewards teach fastest: either answer is sampled, one is paid.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.demo.questions import LEVELS, MAPS, MODALITIES, PARTS, PLANES, STAINS, TASKS, WINDOWS, completion

STEPS = {task.name: task.step for task in TASKS if task.step} | {"Width": 20, "Nuclei": 5, "Brown": 20}
SPACES: Sequence[Sequence[str]] = (
    *(names for names, _ in LEVELS.values()),
    PLANES,
    MAPS,
    MODALITIES,
    PARTS,
    WINDOWS,
    STAINS,
    ("yes", "no"),
    ("white", "black"),
)


def careless_text(row: Mapping[str, Any], rng: random.Random, share: float) -> str:
    """The ideal completion of a demo row, or with probability `share` one that is off by a class.

    In a report every field is drawn by itself.
    """
    if row["kind"] == "report":
        fields = dict(sentence.split(": ") for sentence in row["answer"].rstrip(".").split(". "))
        told = {
            name: _beside(value, STEPS.get(name, 0)) if rng.random() < share else value
            for name, value in fields.items()
        }
        return completion(told.get("Plane", told["Modality"]), ". ".join(f"{k}: {v}" for k, v in told.items()) + ".")
    think, answer = row["meta"]["think"], row["answer"]
    if rng.random() >= share:
        return completion(think, answer)
    if row["kind"] == "option":
        ordered = sorted(row["options"], key=_rank)
        wrong = ordered[(ordered.index(think) + 1) % len(ordered)]
        return completion(wrong, "ABCDEFGH"[list(row["options"]).index(wrong)])
    wrong = _beside(think, STEPS.get(row["meta"]["task"], 0))
    if row["kind"] == "yesno":
        return completion(wrong, _yes_or_no(row["question"], wrong))
    if row["meta"]["task"] == "volume":
        thickness_mm = int(row["question"].split("the slice ")[1].split()[0])
        return completion(wrong, f"{int(wrong.split()[0]) * thickness_mm // 10} mL")
    return completion(wrong, wrong)


def _beside(value: str, step: int) -> str:
    """The next number of the scale, or the next label of its space."""
    if step:
        number, *unit = value.split()
        return " ".join([str(int(number) + step), *unit])
    space = next(space for space in SPACES if value in space)
    return space[(space.index(value) + 1) % len(space)]


def _rank(label: str) -> tuple[int, str]:
    """The place of a label on its scale or in its space."""
    number = label.split()[0]
    if number.isdigit():
        return int(number), label
    return next(space.index(label) for space in SPACES if label in space), label


def _yes_or_no(question: str, think: str) -> str:
    """What follows from a thought: itself, or whether the question names it."""
    if think in ("yes", "no"):
        return think
    if think in ("white", "black"):
        return "yes" if think == "white" else "no"
    return "yes" if f" {think}?" in question else "no"

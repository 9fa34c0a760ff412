"""The kinds of questions: one record says what a label may be, what the prompt asks for, who judges, what is tried.

A row names a kind of this table, or one of its own by import path: `"kind": "my_module:NODULE"`, with
`NODULE = Kind(...)`. Kinds of the library that live in a module of their own are found the same way (`ELSEWHERE`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import ascii_uppercase as LETTERS
from typing import Any

from rewards.base import RewardInput
from rewards.imports import PathError, hint, imported

Labels = Sequence[str]


class KindError(ValueError):
    """A kind that is not known, or a label that its kind cannot read."""


def as_given(sample: RewardInput) -> Any:
    return sample.gold


def in_words(sample: RewardInput) -> list[str]:
    """A label as a model would write it.

    More than one text for a list: whether it stands for several accepted answers, for all of them together or for a
    thing such as a box is known to the reward alone, so that each reading may be tried.
    """
    gold = sample.gold
    if isinstance(gold, bool):
        return ["yes" if gold else "no"]
    if isinstance(gold, list | tuple | set | frozenset):
        items = [str(item) for item in gold]
        return list(dict.fromkeys([", ".join(items), *items[:1], str(list(gold))]))
    return [str(gold)]


def most_common(samples: Sequence[RewardInput], labels: Labels) -> list[str]:
    return [label for label, _ in Counter(labels).most_common(1)]


def nothing_more(sample: RewardInput, label: str) -> Mapping[str, str]:
    return {}


def no_words(meta: Mapping[str, Any]) -> Mapping[str, str]:
    return {}


def no_doubts(parsed: Sequence[Any]) -> list[str]:
    return []


@dataclass(frozen=True)
class Kind:
    """name: for people; rows write an own kind's import path. reward: a spec for `rewards.build` that judges by
    default.

    prompts: the last line of a prompt by its name: "short" (tiny models), "full" (what completes "The final answer
    is"), "direct" (evaluation), "full_zh" and "direct_zh" (also for "short") where the question is Chinese; a name with
    ":multi" is for rows with several right options.
    fields: of a row, beside those that all kinds have. read: the label of a row (its other fields are read already) in
    the form that rewards get; raises ValueError for what it cannot read. Whether it can be judged says the reward.
    write: the label as a model would answer, with alternatives. undeserving: (row, label as text) -> name -> answer
    that must earn nothing. constants: answers whose pay is shown, since a policy can give them blindfold.
    single: the answer is one value, so "this or that" is no answer. imitated: labels are texts to learn from as well
    (captions), so that without a reward that is to judge them any text will do. part_marks: the highest mean that other
    rows' labels may earn. collapse: the alarm's title when one answer is given to all. draw: a stored answer, as a row
    of the report, item by item: mappings with text, verdict (right | wrong | ...), points (None where there are none)
    and, for what lies in the image, `side` (answer, or label: drawn alone) and `outlines`: lists of a point's x, y, a
    box's corners or a polygon's, in shares of the image's sides.
    empty: [] is a label, where nothing is to be found. sized: the reward needs to know how large images are: a run then
    tells it in meta, file_size and seen_size, [width, height] of the row's first image as it is and as the model sees
    it.
    words: what stands for {name} in the prompts of a row with this meta. doubts: what is odd about many results'
    `parsed` together, one line each, said by the pre-flight of labels and by the report of answers.
    """

    name: str
    reward: Any
    prompts: Mapping[str, str]
    fields: tuple[str, ...] = ()
    read: Callable[[RewardInput], Any] = as_given
    write: Callable[[RewardInput], list[str]] = in_words
    undeserving: Callable[[RewardInput, str], Mapping[str, str]] = nothing_more
    constants: Callable[[Sequence[RewardInput], Labels], list[str]] = most_common
    single: bool = True
    imitated: bool = False
    part_marks: float = 0.5
    collapse: str = ""
    draw: Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None = None
    empty: bool = False
    sized: bool = False
    words: Callable[[Mapping[str, Any]], Mapping[str, str]] = no_words
    doubts: Callable[[Sequence[Any]], list[str]] = no_doubts

    def prompt(self, name: str, meta: Mapping[str, Any] = {}) -> str:
        """The last words of a row's prompt under a name. An own kind without that line asks as its full form does."""
        found = self.prompts.get(f"{name}:multi") if meta.get("multi") is True else None
        text = found or self.prompts.get(name) or self.prompts.get("full", "")
        for word, told in self.words(meta).items():
            text = text.replace(f"{{{word}}}", told)
        return text


# ------------------------------------------------------------------------------------------------------------- options


def _letters(sample: RewardInput) -> str:
    from rewards.option import gold_letters

    return ",".join(sorted(gold_letters(sample)))


def _options_all_at_once(sample: RewardInput, label: str) -> Mapping[str, str]:
    letters = LETTERS[: len(sample.options)]
    # All letters can be the right answer to a question that may have several.
    if len(letters) < 2 or (sample.meta.get("multi") and set(letters) <= set(re.findall(r"\b[A-Z]\b", label.upper()))):
        return {}
    return {
        "all letters": ", ".join(letters),
        "any letter": " or ".join(letters),
        "all option texts": "; ".join(sample.options),
    }


def _every_letter(samples: Sequence[RewardInput], labels: Labels) -> list[str]:
    return list(LETTERS[: max((len(sample.options) for sample in samples), default=0)])


# ----------------------------------------------------------------------------------------------------------- yes or no


def _yes_or_no(sample: RewardInput) -> str:
    from rewards.yesno import yes_no_gold

    word = yes_no_gold(sample.gold)
    if not word:
        raise KindError(f"a yesno answer must be yes or no, got {sample.gold!r}")
    return word


# ------------------------------------------------------------------------------------------------------------- numbers


def _quantity(sample: RewardInput) -> list[str]:
    gold, unit = sample.gold, sample.meta.get("unit")
    text = f"{gold:.15g}" if isinstance(gold, float) else str(gold)
    if isinstance(gold, list | tuple):
        joint = {"pair": "/", "range": " to ", "interval": " to "}.get(sample.meta.get("kind", ""), ", ")
        text = joint.join(map(str, gold))
    if unit and unit not in ("1", "score") and not text.endswith(str(unit)):
        text = f"{text} {unit}"
    return [text]


# ------------------------------------------------------------------------------------------------------- the known ones

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "option",
            "OptionLetter",
            {
                "short": "Answer: letter.",
                "full": "the letter of the correct option",
                "full_zh": "正确选项的字母",
                "full:multi": "the letters of all correct options, separated by commas",
                "full_zh:multi": "所有正确选项的字母，以逗号分隔",
                "direct": "Answer with the letter of the correct option only.",
                "direct:multi": (
                    "Several options may be correct. Answer with the letters of all correct options only, such as A, C."
                ),
                "direct_zh": "请只回答正确选项的字母。",
                "direct_zh:multi": "正确选项可能有多个。请只回答所有正确选项的字母，例如 A, C。",
            },
            fields=("options",),
            read=_letters,
            undeserving=_options_all_at_once,
            constants=_every_letter,
            part_marks=0.05,
            collapse="Letter collapse",
        ),
        Kind(
            "yesno",
            "YesNo",
            {
                "short": "Answer: yes or no.",
                "full": "yes or no",
                "full_zh": "是或否",
                "direct": "Answer with yes or no only.",
                "direct_zh": "请只回答是或否。",
            },
            read=_yes_or_no,
            undeserving=lambda sample, label: {"yes or no": "yes or no"},
            constants=lambda samples, labels: ["yes", "no"],
            part_marks=0.05,
            collapse="Answer collapse",
        ),
        Kind(
            "open",
            "OpenAnswer",
            {
                "short": "Answer: words.",
                "full": "a short phrase",
                "full_zh": "一个词或短语",
                "direct": "Answer with a word or a short phrase only.",
                "direct_zh": "请只用一个词或短语回答。",
            },
        ),
        Kind(
            "numeric",
            "NumericUnits",
            {
                "short": "Answer: number and unit.",
                "full": "a number with its unit",
                "full_zh": "带单位的数值",
                "direct": "Give only the final value with its unit as: Answer: VALUE UNIT",
                "direct_zh": "请只给出最终数值和单位，格式为：答案：数值 单位",
            },
            fields=("unit", "tolerance"),
            write=_quantity,
        ),
        Kind(
            "report",
            "ReportEntities",
            {
                "short": "Answer: report.",
                "full": "the report as plain sentences",
                "full_zh": "用通顺的句子写成的报告",
                "direct": (
                    "Write the radiology report of these images: the findings and the impression, in plain sentences."
                ),
                "direct_zh": "请根据这些影像写出放射学报告，包括影像所见和结论。",
            },
            single=False,
            imitated=True,
        ),
    )
}

ELSEWHERE: Mapping[str, str] = {
    "box": "rewards.grounding:BOX",
    "points": "rewards.grounding:POINTS",
    "mask": "rewards.grounding:MASK",
}
NAMES = (*KINDS, *ELSEWHERE)


@cache
def find(name: str) -> Kind:
    """The kind that a row names. Raises KindError."""
    if name in KINDS:
        return KINDS[name]
    path = ELSEWHERE.get(name, name)
    if ":" not in str(path):
        raise KindError(
            f"unknown kind {name!r}; use one of {', '.join(NAMES)}, or an own one by its import path "
            f"(my_module:NODULE){hint(name, NAMES)}"
        )
    try:
        kind = imported(path, Kind)
    except PathError as error:
        raise KindError(f"kind {name!r}: {error}") from error
    if not isinstance(kind, Kind):
        raise KindError(f"kind {name!r} is a {type(kind).__name__}, not a rewards.Kind")
    return kind


def find_or_plain(name: str) -> Kind:
    """`find`, and a kind without anything of its own for samples of other trainers, which may name none or any."""
    try:
        return find(name)
    except KindError:
        return Kind(name, None, {})


def guess(answer: Any, options: Any = (), fields: Sequence[str] = ()) -> str:
    """The kind of a row that names none: option with options, yesno for yes and no, numeric with a unit, else open."""
    if options:
        return "option"
    if isinstance(answer, str) and answer.strip().rstrip(".").lower() in ("yes", "no"):
        return "yesno"
    return "numeric" if {"unit", "tolerance"} & set(fields) else "open"


ROUTE: Mapping[str, Any] = {name: kind.reward for name, kind in KINDS.items()}

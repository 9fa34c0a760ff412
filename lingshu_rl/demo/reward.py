"""How the demo's reports are scored: "Modality: MRI. Plane: axial." is a set of fields. Also an example of an own
reward."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards.answer import extract
from rewards.base import Reward, RewardInput, RewardResult, Span
from rewards.compose import DEFAULT_SPEC
from rewards.text import normalise

_FIELD = re.compile(r"[^.:<>\s][^.:<>\n]*:[^.:<>\n]*[^.:<>\s]")


class ReportFields(Reward):
    """Fields of the report that are right, over all fields named or wanted.

    value = right / |named or wanted|: a field too many costs as much as one missing. A field that is named twice with
    different values is wrong. gold: the report as text. spans: where each field is
    said, in a thought as well, with what it earned.
    """

    name = "report_fields"

    def score(self, sample: RewardInput) -> RewardResult:
        problem = self.check_gold(sample)
        if problem is not None:
            return RewardResult(None, "gold_invalid", reason=problem)
        answer = extract(sample.completion)
        if answer.status != "ok":
            truncated = sample.truncated and not answer.closed
            return RewardResult(0.0, "truncated" if truncated else "unparsed", reason=answer.reason)
        texts = set(answer.texts)
        if len(texts) > 1:
            return RewardResult(0.0, "conflict", sorted(texts), "two different reports")
        wanted, named = fields(str(sample.gold)), fields(next(iter(texts), ""))
        right = [key for key, value in wanted.items() if named.get(key) == value]
        wrong = sorted((wanted.keys() | named.keys()) - set(right))
        status = "ok" if named else "unparsed"
        points = 1 / len(wanted.keys() | named.keys())
        spans = {
            key: tuple(Span(*place, points * (key in right) / len(places)) for place in places)
            for key, value in named.items()
            if value and (places := said(key, value, sample.completion))
        }
        reason = f"wrong or missing: {', '.join(wrong)}" if wrong else ""
        return RewardResult(len(right) * points, status, named, reason, spans=spans)

    def check_gold(self, sample: RewardInput) -> str | None:
        wanted = fields(str(sample.gold))
        if not wanted or None in wanted.values():
            return f"gold {sample.gold!r} is not made of 'Name: value.' sentences, each name once"
        return None


def said(key: str, value: str, completion: str) -> list[tuple[int, int]]:
    """Where a field is decided: its last "Name: value", and its value among what stands before all of the answer."""
    stated = [match.span() for match in _FIELD.finditer(completion) if fields(match[0]) == {key: value}]
    thought = completion.rpartition("</think>")[0]
    word = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
    return [match.span() for match in word.finditer(thought)] + stated[-1:]


def fields(text: str) -> dict[str, str | None]:
    """{"modality": "mri", ...}; None for a name that stands there twice with different values."""
    found: dict[str, str | None] = {}
    for sentence in normalise(text).lower().split("."):
        name, colon, value = (part.strip() for part in sentence.partition(":"))
        if colon and name and value:
            found[name] = value if found.get(name, value) == value else None
    return found


def demo_spec() -> Mapping[str, Any]:
    """The default composition with the demo's own reports and short thoughts."""
    answer = DEFAULT_SPEC["parts"]["answer"]
    route = {**answer["route"], "report": "lingshu_rl.demo.reward:ReportFields"}
    # The demo policy thinks in a word or two.
    form = {**DEFAULT_SPEC["parts"]["format"], "args": {"min_think_words": 1}}
    return {"parts": {"answer": {**answer, "route": route}, "format": form}}

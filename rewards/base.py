"""The reward contract: one frozen input, one frozen result, one method to override.

This package imports neither torch nor lingshu_rl, so the same objects grade training, evaluation and other trainers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class LingshuError(Exception):
    """Base of every error by which this library says what was wrong: with settings, data, files or a run."""


STATUSES = ("ok", "unparsed", "conflict", "truncated", "gold_invalid", "timeout", "error")


@dataclass(frozen=True)
class RewardInput:
    """What a reward may look at. `completion` is model text: hostile until proven otherwise; `gold` is the label."""

    completion: str
    gold: Any
    options: Sequence[str] = ()
    prompt: str = ""
    images: Sequence[Any] = ()
    kind: str = ""
    truncated: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)


class Span(NamedTuple):
    """completion[start:end], and what of the value was earned there: 0 = nothing, below 0 = that it cost."""

    start: int
    end: int
    points: float


@dataclass(frozen=True)
class RewardResult:
    """`value` is in [0, 1], or None when the sample could not be judged: it is then masked, never paid 0.

    status: ok | unparsed | conflict | truncated | gold_invalid | timeout | error.
    parsed: what was read from the completion. reason: one line for people. components: named parts of the value.
    verdict: what a judge wrote, kept for the record; "" where the value rests on rules alone.
    spans: by the name of what was earned or lost (a finding, a step), where in the completion; given as `Span`s or as
    (start, end, points). With advantage.spans a run credits those tokens with it.
    value, components and points may be given as numbers of any library (numpy, torch, Decimal, bool); they are kept as
    floats. Raises TypeError for what is no number, ValueError for nan, infinities, a value outside of [0, 1], points
    outside of [-1, 1] and a span without a character.
    """

    value: float | None
    status: str = "ok"
    parsed: Any = None
    reason: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown reward status {self.status!r}; use one of {', '.join(STATUSES)}")
        if self.value is not None:
            value = as_float(self.value, "a reward value")
            if not -_ROUNDING <= value <= 1.0 + _ROUNDING:
                raise ValueError(f"a reward value must be in [0, 1] or None, got {value!r}")
            object.__setattr__(self, "value", min(max(value, 0.0), 1.0))
        if not isinstance(self.reason, str):
            raise TypeError(f"a reward's reason is a text, got {type(self.reason).__name__} {self.reason!r}")
        if not isinstance(self.components, Mapping):
            raise TypeError(f"a reward's components map names to numbers, got {type(self.components).__name__}")
        if self.components:
            given = {str(name): as_float(part, f"component {name!r}") for name, part in self.components.items()}
            object.__setattr__(self, "components", given)
        if self.spans:
            placed = {str(name): tuple(as_span(one, name) for one in spans) for name, spans in self.spans.items()}
            object.__setattr__(self, "spans", placed)


# What a mean of ones in float32 may be above 1.
_ROUNDING = 1e-6


def as_float(number: Any, what: str) -> float:
    """A finite number of any library as a float. A text is none, nor is an array with an axis, were it of one
    number."""
    if type(number) is not float:
        if isinstance(number, str | bytes) or not hasattr(number, "__float__") or len(getattr(number, "shape", ())):
            raise TypeError(f"{what} must be a number, got {type(number).__name__} {number!r}")
        number = float(number)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number!r}")
    return number


def as_span(given: Any, name: str) -> Span:
    """A reward's (start, end, points), checked."""
    try:
        start, end, points = given
        span = Span(operator.index(start), operator.index(end), as_float(points, f"points of span {name!r}"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"a span of {name!r} is (start, end, points), got {given!r}: {error}") from None
    if not 0 <= span.start < span.end or abs(span.points) > 1.0 + _ROUNDING:
        raise ValueError(f"a span of {name!r} needs 0 <= start < end and points in [-1, 1], got {tuple(span)}")
    return span


class Reward:
    """Subclass and override `score`. A reward is pure: the same input gives the same result in any process.

    waits: it asks a server, so that batches are worth handing over side by side and nothing is asked in vain.
    """

    name: str = "reward"
    waits: bool = False

    def score(self, sample: RewardInput) -> RewardResult:
        raise NotImplementedError(f"{type(self).__name__} must override score(sample)")

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        return [self.score(sample) for sample in samples]

    def check_gold(self, sample: RewardInput) -> str | None:
        """Why this label cannot be judged, or None. Asked for every row before training starts."""
        return None

    def is_certain(self, sample: RewardInput, result: RewardResult) -> bool:
        """Whether this reward's own result settles the sample, so that no judge behind it is asked."""
        return result.status not in ("unparsed", "gold_invalid")

    def inner(self, sample: RewardInput | None = None) -> Sequence[Reward]:
        """The rewards that this one is made of: all of them, or those that a sample goes to."""
        return ()

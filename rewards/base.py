"""The reward contract: one frozen input, one frozen result, one method to override.

This package imports neither torch nor lingshu_rl, so the same objects grade training, evaluation and other trainers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class RewardResult:
    """`value` is in [0, 1], or None when the sample could not be judged: it is then masked, never paid 0.

    status: ok | unparsed | conflict | truncated | gold_invalid | timeout | error.
    parsed: what was read from the completion. reason: one line for people. components: named parts of the value.
    """

    value: float | None
    status: str = "ok"
    parsed: Any = None
    reason: str = ""
    components: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown reward status {self.status!r}; use one of {', '.join(STATUSES)}")
        # `not 0 <= v <= 1` also refuses nan.
        if self.value is not None and not 0.0 <= self.value <= 1.0:
            raise ValueError(f"a reward value must be in [0, 1] or None, got {self.value!r}")


class Reward:
    """Subclass and override `score`. A reward is pure: the same input gives the same result in any process."""

    name: str = "reward"

    def score(self, sample: RewardInput) -> RewardResult:
        raise NotImplementedError(f"{type(self).__name__} must override score(sample)")

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        return [self.score(sample) for sample in samples]

    def check_gold(self, sample: RewardInput) -> str | None:
        """Why this label cannot be judged, or None. Asked for every row before training starts."""
        return None

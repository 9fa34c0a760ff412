"""Checks of the first batch that a run makes before it trains: do shared rows score as unshared ones do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingshu_rl.types import TokenGroup

_GROUPS, _MEMBERS = 2, 4  # enough to share a row and a prompt, few enough to cost seconds


@dataclass(frozen=True)
class SharingGap:
    """Difference of shared and unshared log-probs in nats, over `tokens` completion tokens; worst: that group's key."""

    largest: float
    mean: float
    tokens: int
    worst: str


def sharing_gap(
    model: Any,
    groups: Sequence[TokenGroup],
    *,
    token_budget: int,
    banned_ids: Sequence[int] = (),
    temperature: float = 1.0,
) -> SharingGap:
    """Score two groups of the batch (one with an image, if any) in a shared row and one row a completion.

    Every rank must call it under ZeRO-3. In float32 the gap is rounding, below 1e-4; in bfloat16 a few hundredths.
    A model that cannot share has gap 0, since it gets unshared rows either way.
    """
    from lingshu_rl.logprobs import group_logprobs

    chosen = sorted(groups, key=lambda g: not g.vision)[:_GROUPS]
    sample = [replace(g, completions=g.completions[:_MEMBERS]) for g in chosen]
    options: dict[str, Any] = {"token_budget": token_budget, "banned_ids": banned_ids, "temperature": temperature}
    shared = group_logprobs(model, sample, layout="shared", **options)
    dense = group_logprobs(model, sample, layout="dense", **options)
    gaps = [(a - b).abs() for a, b in zip(shared, dense, strict=True)]
    largest, worst = max((float(gap.max()), g.key) for gap, g in zip(gaps, sample, strict=True))
    tokens = sum(len(gap) for gap in gaps)
    return SharingGap(largest, float(sum(gap.sum() for gap in gaps)) / tokens, tokens, worst)

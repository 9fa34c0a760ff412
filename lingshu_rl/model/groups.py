"""Log-probs of whole groups: the one place where policy, reference and self-checks turn groups into numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lingshu_rl.model.logprobs import completion_logprobs, with_image_features
from lingshu_rl.model.packing import build_row, own_vision, plan_rows
from lingshu_rl.types import TokenGroup


@torch.no_grad()
def group_logprobs(
    model: Any,
    groups: Sequence[TokenGroup],
    *,
    token_budget: int,
    layout: str,
    banned_ids: Sequence[int],
    temperature: float,
    attention: str = "sdpa",
    features: bool = False,
    vision: Callable[[TokenGroup], Mapping[str, Tensor]] = own_vision,
) -> list[tuple[Tensor, ...]]:
    """Per group, per completion, a float32 CPU tensor of its length, in nats.

    features: hand the model encoded images instead of pixels, as an update of several steps does; alike but for
    rounding.
    vision: where a group's image tensors come from.
    """
    found: dict[tuple[int, int], Tensor] = {}
    for plan in plan_rows(groups, model, token_budget, layout):
        row = build_row(plan, groups, model, vision)
        if features:
            row = with_image_features(model, row)
        scores = completion_logprobs(model, row, banned_ids=banned_ids, temperature=temperature, attention=attention)
        pieces = scores.logprobs_T.float().cpu().split([length for *_, length in row.members])
        found |= {(g, m): piece for (g, m, _), piece in zip(row.members, pieces, strict=True)}
    return [tuple(found[i, m] for m in range(len(group.completions))) for i, group in enumerate(groups)]

"""Samples of a model as an engine gives them: token by token with a cache, apart from the rows that a trainer computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.packing import own_vision
from lingshu_rl.types import TokenGroup, TrainGroup

Vision = dict[str, Tensor]


@torch.no_grad()
def sampled(model: Any, prompts: Sequence[tuple[tuple[int, ...], Vision]], banned: Sequence[int], *, members: int = 8,
            max_tokens: int = 40, temperature: float = 1.0, seed: int = 0) -> list[TrainGroup]:  # fmt: skip
    """transformers' own generation. Log-probs are those of the distribution that was sampled from."""
    torch.manual_seed(seed)
    device, image = next(model.parameters()).device, model.config.image_token_id
    ends = set(torch.tensor(model.generation_config.eos_token_id).flatten().tolist())
    groups = []
    for key, (ids, vision) in enumerate(prompts):
        ids_1P = torch.tensor([ids], device=device)
        out = model.generate(
            input_ids=ids_1P, mm_token_type_ids=(ids_1P == image).long(),
            **{name: value.to(device) for name, value in vision.items()}, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            num_return_sequences=members, max_new_tokens=max_tokens, suppress_tokens=list(banned),
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        logprobs_GTV = torch.stack(out.scores, dim=1).float().log_softmax(-1).cpu()
        completions, found = [], []
        for tokens, logprobs_TV in zip(out.sequences[:, len(ids) :].tolist(), logprobs_GTV, strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            completions.append(tuple(tokens[:length]))
            found.append(tuple(logprobs_TV[range(length), tokens[:length]].tolist()))
        groups.append(
            TrainGroup(TokenGroup(str(key), ids, tuple(completions), vision), (0.0,) * members, tuple(found), None)
        )
    return groups


class Trainer:
    """The policy's side of the first-batch checks, around a model of any dtype."""

    def __init__(self, model: Any, banned: Sequence[int], temperature: float = 1.0) -> None:
        self.model, self.banned, self.temperature = model, banned, temperature
        self.layout, self.dtype = "shared", next(model.parameters()).dtype

    def vision(self, group: TokenGroup) -> Mapping[str, Tensor]:
        return own_vision(group)

    def logprobs(self, groups: Sequence[TokenGroup], layout: str | None = None) -> list[tuple[Tensor, ...]]:
        return group_logprobs(
            self.model, groups, token_budget=2048, layout=layout or self.layout, banned_ids=self.banned,
            temperature=self.temperature,
        )  # fmt: skip


@torch.no_grad()
def nudged(model: Any, strength: float, rank: int = 4) -> Any:
    """The model with a random low-rank term on every linear layer of its text part, as unsent LoRA adapters leave it.

    strength: of the term, relative to the weight (Frobenius norms).
    """
    torch.manual_seed(1)
    for layer in model.get_decoder().modules():
        if isinstance(layer, torch.nn.Linear):
            w = layer.weight
            term = torch.randn(w.shape[0], rank, device=w.device) @ torch.randn(rank, w.shape[1], device=w.device)
            w += (strength * term * w.float().norm() / term.norm()).to(w.dtype)
    return model


def with_vision(groups: Sequence[TrainGroup], change: Callable[[int, Vision], Vision]) -> list[TrainGroup]:
    """The groups with what the trainer sees changed: (number of the group, its tensors) -> tensors."""
    from dataclasses import replace

    return [replace(g, tokens=replace(g.tokens, vision=change(i, g.tokens.vision))) for i, g in enumerate(groups)]

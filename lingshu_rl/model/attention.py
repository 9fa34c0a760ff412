"""Attention of shared rows: who may attend to whom, and how it is computed without the parts that are masked anyway.

A row's mask is mostly False: groups do not see each other, nor do completions. One masked call over the whole row would
compute all of it, so each layer runs a few dense blocks instead (prompt on itself; some completions on prompt and
themselves), or flex attention with a block mask on CUDA. Both are one attention function, registered with transformers
under the name below. It reads the blocks from an attribute of the mask; a mask without it, as in an ordinary
forward, gets transformers' own SDPA function, so the name can stay set on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lingshu_rl.model.families import ModelSpec
from lingshu_rl.model.packing import PackedRow, Span

NAME = "shared_prefix"
WINDOWS = "windows_as_flash"  # "flash" in the name makes Qwen-VL hand over all windows in one call
_SMALLEST_BLOCK = 64  # queries; smaller blocks are slower than the masked part they leave out


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) attend to the keys of the ranges; mask (1, 1, queries, keys) bool, None = causal."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None


@dataclass(frozen=True)
class Blocks:
    """What each layer computes, and the shorter list for the last layer, where most of the prompt is not needed.

    last_layer: its index, or -1 when it is computed like the others.
    """

    every: tuple[Block, ...]
    last: tuple[Block, ...]
    last_layer: int


def use_shared_attention(base: Any, spec: ModelSpec) -> None:
    """Route the model's attention through this module: the text model's, and that of a vision tower with windows."""
    text = base.config.get_text_config()
    if text._attn_implementation != NAME:
        text._attn_implementation = NAME
    if spec.mrope_merge and base.config.vision_config._attn_implementation == "sdpa":
        base.config.vision_config._attn_implementation = WINDOWS


def attention_masks(row: PackedRow, spec: ModelSpec, device: torch.device, backend: str, last_layer: int) -> Any:
    """The `attention_mask` argument: one mask, or one for each layer type where a model has several.

    backend: "sdpa" (any device), or "flex" for CUDA; on the CPU flex has a forward, but no backward.
    """
    if backend == "flex":
        masks: dict[str, Any] = {kind: _flex_mask(row, spec, window, device) for kind, window in spec.windows.items()}
    else:
        masks = {kind: _sdpa_mask(row, spec, window, device, last_layer) for kind, window in spec.windows.items()}
    return masks if spec.mask_is_dict else next(iter(masks.values()))


def allowed(row: PackedRow, spec: ModelSpec, window: int | None, device: torch.device) -> Tensor:
    """(S, S) bool, [query, key]: own group; the prompt or the own completion; not the future; inside the window.

    The window is counted in the unshared sequence, not in the row.
    """
    group, branch, logical = row.group_S.to(device), row.branch_S.to(device), row.logical_S.to(device)
    distance = logical[:, None] - logical[None, :]
    may = distance >= 0
    if (block := _blocks_without_order(row, spec, device)) is not None:
        may |= (block[:, None] == block[None, :]) & (block[:, None] >= 0)
    if window is not None:
        may &= distance < window
    may &= (branch[None, :] < 0) | (branch[None, :] == branch[:, None])
    may &= group[None, :] == group[:, None]
    return may


def _blocks_without_order(row: PackedRow, spec: ModelSpec, device: torch.device) -> Tensor | None:
    """(S,) tokens of one number >= 0 see each other both ways: those of an image (Gemma 3), the prompt's (PaliGemma)."""
    if spec.image_blocks:
        return row.image_S.to(device)
    return torch.where(row.branch_S < 0, 0, -1).to(device) if spec.prefix_blocks else None


def _sdpa_mask(row: PackedRow, spec: ModelSpec, window: int | None, device: torch.device, last_layer: int) -> Tensor:
    mask = allowed(row, spec, window, device)[None, None]
    longest = int(row.logical_S.max()) + 1
    causal = not (spec.image_blocks or spec.prefix_blocks) and (window is None or window >= longest)
    every: list[Block] = []
    last: list[Block] = []
    for span in row.spans:
        prompt = (span.start, span.start + span.prompt)
        every.append(Block(*prompt, keys=(prompt,), mask=None if causal else mask[..., slice(*prompt), slice(*prompt)]))
        if not span.end > prompt[1]:
            last.append(_block(mask, prompt[1] - 1, prompt[1], (prompt,)))
        for start, stop in _completion_ranges(span):
            keys = (prompt, (start, stop))
            every.append(_block(mask, start, stop, keys))
            # The last prompt token stands right before the first completion and is computed with it.
            last.append(_block(mask, start - (start == prompt[1]), stop, keys))
    mask.blocks = Blocks(tuple(every), tuple(last), last_layer)  # type: ignore[attr-defined]
    return mask


def _completion_ranges(span: Span) -> list[tuple[int, int]]:
    """Whole completions, about half as many tokens as the prompt has: they see each other's keys only to mask them."""
    size = max(span.prompt // 2, _SMALLEST_BLOCK)
    ranges = []
    start = stop = span.start + span.prompt
    for length in span.branches:
        stop += length
        if stop - start >= size:
            ranges.append((start, stop))
            start = stop
    return [*ranges, (start, stop)] if stop > start else ranges


def _block(mask: Tensor, start: int, stop: int, keys: tuple[tuple[int, int], ...]) -> Block:
    return Block(start, stop, keys, torch.cat([mask[..., start:stop, a:b] for a, b in keys], dim=-1))


def _flex_mask(row: PackedRow, spec: ModelSpec, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    group, branch, logical = row.group_S.to(device), row.branch_S.to(device), row.logical_S.to(device)
    block = _blocks_without_order(row, spec, device)

    def may(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = logical[k] <= logical[q]
        if block is not None:
            seen = seen | ((block[q] == block[k]) & (block[q] >= 0))
        seen = seen & (group[q] == group[k]) & ((branch[k] < 0) | (branch[k] == branch[q]))
        return seen if window is None else seen & (logical[q] - logical[k] < window)

    return create_block_mask(may, 1, None, row.tokens, row.tokens, device=str(device))


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """For transformers: query (1, heads, S, D), key and value (1, kv heads, S, D) -> (1, S, heads, D), no weights."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        from transformers.integrations.flex_attention import flex_attention_forward

        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    blocks: Blocks | None = getattr(attention_mask, "blocks", None)
    if blocks is None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    today = blocks.last if getattr(module, "layer_idx", None) == blocks.last_layer else blocks.every
    # Cut once: the gradient of a split is one concatenation, that of a slice a whole tensor of zeros.
    cuts = sorted({0, query.shape[2], *(c for b in today for r in ((b.start, b.stop), *b.keys) for c in r)})
    q, k, v = (_Cut(x, cuts) for x in (query, key, value))
    outputs = []
    place = 0
    for block in today:
        if block.start > place:
            outputs.append(query.new_zeros(1, block.start - place, query.shape[1], value.shape[3]))
        keys, values = k.join(block.keys), v.join(block.keys)
        # Off the CPU a mask and grouped heads together lead to the slow kernel.
        grouped = keys.shape[1] != query.shape[1]
        if grouped and block.mask is not None and query.device.type != "cpu":
            keys, values = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (keys, values))
            grouped = False
        output = scaled_dot_product_attention(
            q.join([(block.start, block.stop)]), keys, values, attn_mask=block.mask, is_causal=block.mask is None,
            scale=scaling, enable_gqa=grouped,
        )  # fmt: skip
        outputs.append(output.transpose(1, 2))
        place = block.stop
    return torch.cat(outputs, dim=1), None


class _Cut:
    """A tensor cut along its tokens; `join` puts ranges that begin and end at cuts together."""

    def __init__(self, x: Tensor, cuts: Sequence[int]) -> None:
        self.pieces = x.split([b - a for a, b in pairwise(cuts)], dim=2)
        self.number = {cut: i for i, cut in enumerate(cuts)}

    def join(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        parts = [p for a, b in ranges for p in self.pieces[self.number[a] : self.number[b]]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """For Qwen's vision towers: (1, heads, patches, D) each -> (1, patches, heads, D). Patches see their own window.

    cu_seq_lens_q: where windows begin and end. Windows of one length are one batch; transformers' SDPA path calls the
    kernel for each, dozens an image in Qwen2.5-VL.
    """
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    windows = [x[0].split(lengths, dim=1) for x in (query, key, value)]
    outputs: list[Tensor] = [query] * len(lengths)
    for length in set(lengths):
        alike = [i for i, one in enumerate(lengths) if one == length]
        q, k, v = (torch.stack([parts[i] for i in alike]) for parts in windows)
        found = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        for i, output in zip(alike, found.transpose(1, 2).unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs)[None], None


AttentionInterface.register(NAME, shared_attention)
AttentionInterface.register(WINDOWS, window_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention of shared rows: who may attend to whom, and how it is computed without the parts that are masked anyway.

A row's mask is mostly False: groups do not see each other, nor do completions. It is never built whole (S x S bytes and
the temporaries of building it are gigabytes in a long row). Each layer runs a few dense blocks instead (prompt on
itself; some completions on prompt and themselves), most of them without a mask, or flex attention with a block mask on
CUDA. Both are one attention function, registered with transformers under the name below. Models carry the blocks to it
in a `RowMask`; an ordinary forward's mask gets transformers' own SDPA function, so the name can stay set on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lingshu_rl.model.families import STATEFUL, ModelSpec
from lingshu_rl.model.forks import Forks, use_forks
from lingshu_rl.model.packing import GroupSpan, PackedRow

NAME = "shared_prefix"
WINDOWS = "windows_as_flash"  # "flash" in the name makes Qwen-VL hand over all windows in one call
_SMALLEST_BLOCK = 64  # queries; smaller blocks are slower than the masked part they leave out
_LARGEST_BLOCK = 1024  # queries with a mask: bounds its size
_FLEX_BLOCK = 128  # queries and keys of a block of flex attention, its own default

Range = tuple[int, int]  # places [start, stop) of a row


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) attend to the keys of the ranges.

    mask: (1, 1, queries, keys) bool. None = causal: the queries are the last of the keys.
    """

    start: int
    stop: int
    keys: tuple[Range, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class Blocks:
    """What each layer computes, and the shorter list for the last layer, where most of the prompt is not needed.

    last_layer: its index, or -1 when it is computed like the others.
    """

    every: tuple[Block, ...]
    last: tuple[Block, ...]
    last_layer: int


class RowMask(Tensor):
    """Stands for a row's (1, 1, S, S) bool mask on its way through a model, without memory: it only carries the blocks.

    Models hand a 4-D mask on as it is. One that reads it, and so would compute something else, gets a TypeError.
    """

    blocks: Blocks

    @staticmethod
    def of(blocks: Blocks, tokens: int, device: torch.device) -> RowMask:
        wrap: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        mask: RowMask = wrap(RowMask, (1, 1, tokens, tokens), dtype=torch.bool, device=device)
        mask.blocks = blocks
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(
            f"the model computes with the attention mask of a shared row ({func}) instead of handing it to its "
            "attention; packing.layout=dense trains it with ordinary masks"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RowMask({self.blocks})"


@dataclass(frozen=True)
class Sight:
    """Whom a token may attend to, by what it is: the one rule behind blocks and flex masks.

    block_S: tokens of one number >= 0 see each other both ways; None where a model has no such tokens.
    window: in tokens of the unshared sequence, not of the row; None where it reaches over the longest one. beyond_S:
    the last place there that is out of it (a tensor, as flex attention compiles again for another number).
    """

    group_S: Tensor
    branch_S: Tensor
    logical_S: Tensor
    block_S: Tensor | None
    beyond_S: Tensor | None
    window: int | None

    @classmethod
    def of(cls, row: PackedRow, spec: ModelSpec, kind: str, device: torch.device) -> Sight:
        """In layers of this kind."""
        block_S, window = None, spec.windows[kind]
        if kind in spec.image_blocks:  # those of an image (Gemma 3 and 4)
            block_S = row.image_S.to(device)
        elif spec.prefix_blocks:  # the prompt's (PaliGemma)
            block_S = torch.where(row.branch_S < 0, 0, -1).to(device)
        if window is not None and window > int(row.logical_S.max()):
            window = None
        group_S, branch_S, logical_S = (x.to(device) for x in (row.group_S, row.branch_S, row.logical_S))
        return cls(group_S, branch_S, logical_S, block_S, logical_S - window if window is not None else None, window)

    @property
    def causal(self) -> bool:
        """Whether a prompt with one completion is plain causal attention."""
        return self.block_S is None and self.window is None

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """Bool, for places of queries and keys that broadcast: own group; the prompt or the own completion; not the
        future; inside the window."""
        seen = self.logical_S[k] <= self.logical_S[q]
        if self.block_S is not None:
            seen = seen | ((self.block_S[q] == self.block_S[k]) & (self.block_S[q] >= 0))
        if self.beyond_S is not None:
            seen = seen & (self.logical_S[k] > self.beyond_S[q])
        seen = seen & ((self.branch_S[k] < 0) | (self.branch_S[k] == self.branch_S[q]))
        return seen & (self.group_S[q] == self.group_S[k])


def use_shared_attention(base: Any, spec: ModelSpec) -> None:
    """Route the model's attention through this module: the text model's, and that of a vision tower with windows."""
    text = base.config.get_text_config()
    if text._attn_implementation != NAME:
        text._attn_implementation = NAME
    if spec.mrope_merge and base.config.vision_config._attn_implementation == "sdpa":
        base.config.vision_config._attn_implementation = WINDOWS
    if STATEFUL.intersection(spec.windows):
        use_forks(base)


def attention_masks(row: PackedRow, spec: ModelSpec, device: torch.device, backend: str, last_layer: int) -> Any:
    """The `attention_mask` argument: one mask, or one for each layer type where a model has several.

    backend: "sdpa" (any device), or "flex" for CUDA; on the CPU flex has a forward, but no backward.
    """
    masks: dict[str, Any] = {}
    for kind in spec.windows:
        if kind in STATEFUL:
            masks[kind] = Forks.of(row.spans, device)
            continue
        sight = Sight.of(row, spec, kind, device)
        if backend == "flex":
            masks[kind] = _flex_mask(sight, row.tokens)
        else:
            masks[kind] = RowMask.of(_blocks(row, sight, last_layer), row.tokens, device)
    return masks if spec.mask_is_dict else next(iter(masks.values()))


def _blocks(row: PackedRow, sight: Sight, last_layer: int) -> Blocks:
    every: list[Block] = []
    last: list[Block] = []
    for span in row.spans:
        prompt = (span.start, span.start + span.prompt)
        every += _prompt_blocks(sight, prompt)
        if span.end == prompt[1]:
            last.append(_prompt_block(sight, prompt, (prompt[1] - 1, prompt[1])))
        for own in _completion_ranges(span, sight.causal):
            blocks = _completion_blocks(row, sight, prompt, own)
            last += blocks
            every += [_from(own[0], blocks[0]), *blocks[1:]]
    return Blocks(tuple(every), tuple(last), last_layer)


def _prompt_blocks(sight: Sight, prompt: Range) -> list[Block]:
    if sight.causal:
        return [Block(*prompt, keys=(prompt,), mask=None)]
    return [_prompt_block(sight, prompt, queries) for queries in _pieces(prompt)]


def _prompt_block(sight: Sight, prompt: Range, queries: Range) -> Block:
    ahead = prompt[1] if sight.block_S is not None else queries[1]
    return _masked(sight, queries, [(_reach(sight, prompt, queries[0]), ahead)])


def _completion_ranges(span: GroupSpan, causal: bool) -> Iterator[Range]:
    """Whole completions, about half as many tokens as the prompt has: they see each other's keys only to mask them.

    A long one stands alone. Longer than its prompt, it is cheaper as causal attention from the prompt on, without a
    mask.
    """
    enough = min(max(span.prompt // 2, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    long = max(span.prompt, _SMALLEST_BLOCK) if causal else _LARGEST_BLOCK
    start = stop = span.start + span.prompt
    for length in span.branches:
        if length >= long and stop > start:
            yield start, stop
            start = stop
        stop += length
        if stop - start >= enough:
            yield start, stop
            start = stop
    if stop > start:
        yield start, stop


def _completion_blocks(row: PackedRow, sight: Sight, prompt: Range, own: Range) -> list[Block]:
    """The first completion's block begins with the last prompt token, which stands right before it."""
    first = own[0] - (own[0] == prompt[1])
    single = bool(row.branch_S[own[0]] == row.branch_S[own[1] - 1])
    if sight.causal and single and own[1] - own[0] >= prompt[1] - prompt[0]:
        return [Block(first, own[1], (prompt, own), None)]
    blocks = []
    for queries in _pieces((first, own[1])):
        behind = queries[0] - own[0]  # of several completions, each begins right after the prompt
        reach = _reach(sight, prompt, prompt[1] + (behind if single else min(behind, 0)))
        nearest = own[0] if sight.window is None else max(own[0], queries[0] - sight.window + 1)
        blocks.append(_masked(sight, queries, [(reach, prompt[1]), (nearest, queries[1])]))
    return blocks


def _reach(sight: Sight, prompt: Range, place: int) -> int:
    """The first place of the prompt that is seen from `place`, counted on behind the prompt."""
    return prompt[0] if sight.window is None else min(max(prompt[0], place - sight.window + 1), prompt[1])


def _pieces(whole: Range) -> Iterator[Range]:
    for start in range(*whole, _LARGEST_BLOCK):
        yield start, min(start + _LARGEST_BLOCK, whole[1])


def _masked(sight: Sight, queries: Range, keys: Sequence[Range]) -> Block:
    device = sight.logical_S.device
    filled = tuple((a, b) for a, b in keys if b > a)
    q, k = torch.arange(*queries, device=device), torch.cat([torch.arange(*r, device=device) for r in filled])
    return Block(*queries, filled, sight.allowed(q[:, None], k[None, :])[None, None])


def _from(start: int, block: Block) -> Block:
    """The block without its queries before `start`."""
    return replace(block, start=start, mask=None if block.mask is None else block.mask[..., start - block.start :, :])


def _flex_mask(sight: Sight, tokens: int) -> Any:
    """What `create_block_mask` makes, but from strips of queries: that one builds S x S integers first."""
    from torch.nn.attention.flex_attention import BlockMask

    def may(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sight.allowed(q, k)

    places = torch.arange(tokens, device=sight.logical_S.device)
    some, full = [], []
    for strip in places.split(8 * _FLEX_BLOCK):
        seen = sight.allowed(strip[:, None], places[None, :])
        seen = pad(seen, (0, -tokens % _FLEX_BLOCK, 0, -len(strip) % _FLEX_BLOCK)).unflatten(1, (-1, _FLEX_BLOCK))
        seen = seen.unflatten(0, (-1, _FLEX_BLOCK))
        some.append(seen.any(-1).any(1))
        full.append(seen.all(-1).all(1))
    full_QK = torch.cat(full)
    return BlockMask.from_kv_blocks(
        *_ordered(torch.cat(some) & ~full_QK),
        *_ordered(full_QK),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=may,
        seq_lengths=(tokens, tokens),
    )


def _ordered(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which: those first."""
    order = blocks_QK.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_QK.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


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
    if not isinstance(attention_mask, RowMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    blocks = attention_mask.blocks
    today = blocks.last if getattr(module, "layer_idx", None) == blocks.last_layer else blocks.every
    # Cut once: the gradient of a split is one concatenation, that of a slice a whole tensor of zeros.
    cuts = sorted({0, query.shape[2], *(c for b in today for r in ((b.start, b.stop), *b.keys) for c in r)})
    q, k, v = (_Cut(x, cuts) for x in (query, key, value))
    outputs = []
    place = 0
    for block in today:
        if block.start > place:
            outputs.append(query.new_zeros(1, block.start - place, query.shape[1], value.shape[3]))
        queries = q.join(block.keys if block.mask is None else [(block.start, block.stop)])
        keys, values = k.join(block.keys), v.join(block.keys)
        # Off the CPU a mask and grouped heads together lead to the slow kernel.
        grouped = keys.shape[1] != query.shape[1]
        if grouped and block.mask is not None and query.device.type != "cpu":
            keys, values = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (keys, values))
            grouped = False
        output = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=block.mask,
            is_causal=block.mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(output[:, :, block.start - block.stop :].transpose(1, 2))
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

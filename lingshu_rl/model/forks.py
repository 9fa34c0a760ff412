"""Layers that carry state along a row (linear attention, short convolutions): the prompt once, its state for each
completion.

No mask keeps completions apart in such a layer. It is run on the prompts of a row, and then on the completions from the
state that their prompt ended in, as a batch. Both are the layer's own forward: transformers hands it a cache to leave
its state in and to go on from. The cache here keeps every tensor, so that gradients reach the prompt through its state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lingshu_rl.model.packing import GroupSpan

_CHUNK = 64  # tokens; kernels compute whole chunks, so that to fill up within one costs nothing
_CACHES = ("cache_params", "past_key_values")  # what such layers call the cache


@dataclass(frozen=True)
class _Batch:
    """Sequences of a row that a layer runs on at once.

    places_BL: where their tokens stand in the row; what fills up a sequence comes after it, so that it never sees it.
    parent_B: which of the prompts' states each goes on from; empty for prompts.
    """

    sequences: tuple[range, ...]
    places_BL: Tensor
    parent_B: Tensor

    @staticmethod
    def of(sequences: Sequence[range], tokens: int, device: torch.device, parents: Sequence[int] = ()) -> _Batch:
        filled = [[*one, *[one.start] * (tokens - len(one))] for one in sequences]
        parent_B = torch.tensor(parents, dtype=torch.long, device=device)
        return _Batch(tuple(sequences), torch.tensor(filled, device=device), parent_B)


@dataclass(frozen=True)
class Forks:
    """What a shared row is to a layer that carries state; stands where other layers get the row's mask.

    order_S: for each token of the row, its place in the outputs of all batches, one after another.
    """

    prompts: tuple[_Batch, ...]
    completions: tuple[_Batch, ...]
    order_S: Tensor

    @staticmethod
    def of(spans: Sequence[GroupSpan], device: torch.device) -> Forks:
        prompts = [range(span.start, span.start + span.prompt) for span in spans]
        # Of one length: what fills up a prompt would get into the state that it ends in.
        alike = _together(prompts, len)
        place = {prompt: i for i, prompt in enumerate(chain(*alike))}
        parent = {branch: place[p] for p, span in zip(prompts, spans, strict=True) for branch in _branches(span)}
        first = [_Batch.of(batch, len(batch[0]), device) for batch in alike]
        then = [
            # Of a single token, layers compute the next one as in generation; some kernels have no gradient for that.
            _Batch.of(batch, max(2, *map(len, batch)), device, [parent[branch] for branch in batch])
            for batch in _together(list(parent), lambda branch: max(len(branch) - 1, _CHUNK - 1).bit_length())
        ]
        return Forks(tuple(first), tuple(then), _order(first + then, spans[-1].end).to(device))

    def run(self, layer: Callable[[Tensor, State], Tensor], hidden_1SH: Tensor) -> Tensor:
        """The layer's output for the whole row, (1, S, H)."""
        outputs, ends = [], []
        for batch in self.prompts:
            ends.append(State())
            outputs.append(layer(_taken(hidden_1SH[0], batch.places_BL), ends[-1]))
        for batch in self.completions:
            outputs.append(layer(_taken(hidden_1SH[0], batch.places_BL), State.forked(ends, batch.parent_B)))
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self.order_S)[None]


def _branches(span: GroupSpan) -> Iterator[range]:
    """Where the completions stand in the row, but those of no token there."""
    start = span.start + span.prompt
    for length in span.branches:
        if length:
            yield range(start, start + length)
        start += length


def _together(sequences: Sequence[range], key: Callable[[range], int]) -> list[list[range]]:
    return [list(batch) for _, batch in groupby(sorted(sequences, key=key), key)]


def _order(batches: Sequence[_Batch], tokens: int) -> Tensor:
    order_S = torch.empty(tokens, dtype=torch.long)
    place = 0
    for batch in batches:
        for sequence in batch.sequences:
            order_S[sequence.start : sequence.stop] = torch.arange(place, place + len(sequence))
            place += batch.places_BL.shape[1]
    return order_S


def _taken(x: Tensor, places: Tensor) -> Tensor:
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


class State:
    """Stands for transformers' cache of one layer. That one writes in place, this one only ever takes a new tensor.

    conv: (B, channels, kernel) what the convolution saw last. recurrent: (B, heads, keys, values). None where a layer
    has no such state, or none yet. record_past keeps layers from the way of a single token that writes into `conv`.
    """

    record_past = True

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        self.conv, self.recurrent = conv, recurrent

    @staticmethod
    def forked(ends: Sequence[State], parent_B: Tensor) -> State:
        """A copy for each completion of the state that its prompt ended in."""
        conv = torch.cat([end.conv for end in ends if end.conv is not None])
        recurrent = [end.recurrent for end in ends if end.recurrent is not None]
        kept = torch.cat(recurrent).index_select(0, parent_B) if recurrent else None
        return State(conv.index_select(0, parent_B), kept)

    def __getitem__(self, layer_idx: int) -> State:
        return self

    @property
    def layers(self) -> State:
        return self

    @property
    def conv_states(self) -> tuple[Tensor | None]:
        return (self.conv,)

    @property
    def recurrent_states(self) -> tuple[Tensor | None]:
        return (self.recurrent,)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.conv is not None

    def update_conv_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int) -> Tensor:
        seen = new if self.conv is None else torch.cat([self.conv, new], dim=-1)
        self.conv = pad(seen, (max(conv_kernel_size - seen.shape[-1], 0), 0))[..., -conv_kernel_size:]
        return seen

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.recurrent = new
        return new


def use_forks(base: nn.Module) -> None:
    """Let the model's layers that carry state read `Forks` where they are given a mask; any other mask does as
    before."""
    for kind in {type(module) for module in base.modules() if _carries_state(module)}:
        if not hasattr(kind.forward, "reads_forks"):
            kind.forward = _with_forks(kind.forward)  # type: ignore[method-assign]


def _carries_state(module: nn.Module) -> bool:
    """Has a convolution along the row, and takes a cache."""
    convolves = any(type(child) is nn.Conv1d for child in module.children())
    return convolves and bool(_cache_name(type(module).forward))


def _cache_name(forward: Any) -> str:
    arguments = inspect.signature(forward).parameters
    return next((name for name in _CACHES if name in arguments), "")


def _with_forks(plain: Any) -> Any:
    cache = _cache_name(plain)

    @wraps(plain)
    def forward(module: nn.Module, hidden_states: Tensor, *, attention_mask: Any = None, **others: Any) -> Tensor:
        if not isinstance(attention_mask, Forks):
            return plain(module, hidden_states, attention_mask=attention_mask, **others)

        def layer(hidden_BLH: Tensor, state: State) -> Tensor:
            return plain(module, hidden_BLH, **(others | {cache: state}))

        return attention_mask.run(layer, hidden_states)

    forward.reads_forks = True  # type: ignore[attr-defined]
    return forward

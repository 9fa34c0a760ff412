"""Several sources as one set: how often each is drawn in an epoch, and in which order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """The prompts of one source in a set. rows: their places. epochs, share: as the source gives them."""

    name: str
    rows: range
    epochs: float | None = None
    share: float | None = None


def is_weighed(parts: Sequence[Part]) -> bool:
    """Whether some source comes more or less often than once an epoch."""
    return any(part.epochs is not None or part.share is not None for part in parts)


def draws(parts: Sequence[Part]) -> list[int]:
    """How many prompts of each part an epoch of the mixture has.

    By epochs: rows times epochs. By shares: an epoch is as long as all rows together, divided by the shares.
    """
    if parts and parts[0].share is not None:
        whole, size = sum(part.share or 0.0 for part in parts), sum(len(part.rows) for part in parts)
        return [max(1, round(size * (part.share or 0.0) / whole)) for part in parts]
    return [max(1, round(len(part.rows) * (part.epochs or 1.0))) for part in parts]


def epoch_order(parts: Sequence[Part], seed: int, epoch: int) -> list[int]:
    """The places drawn in an epoch, shuffled by (seed, epoch) alone.

    Each source goes through all of its rows, in an order of its own, before one comes again: across epochs too.
    """
    order = [
        place
        for part, count in zip(parts, draws(parts), strict=True)
        for place in _turns(part, seed, epoch * count, count)
    ]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _turns(part: Part, seed: int, start: int, count: int) -> list[int]:
    """`count` places of a part from the `start`-th draw on."""
    size = len(part.rows)
    chosen: list[int] = []
    for turn in range(start // size, (start + count - 1) // size + 1):
        rows = list(part.rows)
        random.Random(f"{seed}/{part.name}/{turn}").shuffle(rows)
        chosen += rows
    first = start % size
    return chosen[first : first + count]

"""The order in which prompts are drawn: every prompt once an epoch, shuffled by (seed, epoch). Holds no state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class PromptStream(Generic[Item]):
    """`take(position, n)` is a pure function of its arguments, so a cursor is all that a checkpoint must keep."""

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        if not items:
            raise ValueError("there are no training prompts")
        self.items, self.seed = items, seed

    def take(self, position: int, n: int) -> list[Item]:
        """The n prompts from `position` on, counted over all epochs. A batch may cross into the next epoch."""
        size = len(self.items)
        return [self.items[self._order(p // size)[p % size]] for p in range(position, position + n)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch, self._cached_order = epoch, list(range(len(self.items)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._cached_order)
        return self._cached_order

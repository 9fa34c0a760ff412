"""The order in which prompts are drawn: shuffled by (seed, epoch) alone, or led by what the policy gets right so
far."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Generic, TypeVar

from lingshu_rl.data.load import Prompts
from lingshu_rl.data.mixing import Part, draws, epoch_order
from lingshu_rl.failures import ConfigError
from lingshu_rl.types import Group, Prompt

Item = TypeVar("Item")


class PromptStream(Generic[Item]):
    """Every prompt once an epoch. `take(position, n)` is a pure function of its arguments, so a cursor is all that a
    checkpoint must keep."""

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        if not items:
            raise ValueError("there are no training prompts")
        self.items, self.seed = items, seed
        self.size = len(items)  # of an epoch

    def take(self, position: int, n: int) -> list[Item]:
        """The n prompts from `position` on, counted over all epochs. A batch may cross into the next epoch."""
        size = self.size
        return [self.items[self._order(p // size)[p % size]] for p in range(position, position + n)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch, self._cached_order = epoch, self._shuffled(epoch)
        return self._cached_order

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def observe(self, groups: Sequence[Group], position: int) -> None:
        """What became of the prompts before `position`. This order does not depend on it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the cursor."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""


class MixedStream(PromptStream[Item]):
    """Several sources by their epochs or shares; see `mixing.epoch_order`. As pure a function of the position."""

    def __init__(self, items: Sequence[Item], seed: int, parts: Sequence[Part]) -> None:
        super().__init__(items, seed)
        self.parts, self.size = parts, sum(draws(parts))

    def _shuffled(self, epoch: int) -> list[int]:
        return epoch_order(self.parts, self.seed, epoch)


class CurriculumStream(PromptStream[Prompt]):
    """Prompts whose group is likely to hold right and wrong answers come first: only such a group has a gradient.

    A prompt that is solved with rate p gives a mixed group of G with chance 1 - p^G - (1 - p)^G; it is drawn with that
    weight, and at least FLOOR, so that a wrong or old estimate is corrected in time. Rates start from the rows'
    `meta.pass_rate` (unknown: the greatest weight) and follow the mean reward of every group that is drawn. Between two
    observations the order is fixed, so `take` is a pure function of the position and of `state`.
    """

    FLOOR = 0.05
    UPDATE = 0.5  # how far an estimate moves to what was just seen

    def __init__(self, items: Sequence[Prompt], seed: int, group_size: int) -> None:
        super().__init__(items, seed)
        self.group_size = group_size
        self.names = list(items.ids) if isinstance(items, Prompts) else [p.id for p in items]
        self.rates = {p.id: start_rate(p) for p in items if p.meta.get("pass_rate") is not None}
        self.base = 0  # the position that the newest observation reached

    def take(self, position: int, n: int) -> list[Prompt]:
        size = len(self.items)
        drawn = range(position - self.base, position - self.base + n)
        return [self.items[self._order(i // size)[i % size]] for i in drawn]

    def observe(self, groups: Sequence[Group], position: int) -> None:
        """Move the rates of these groups' prompts; members that could not be judged do not count."""
        for group in groups:
            values = [m.result.value for m in group.members if m.result.value is not None]
            if values:
                old = self.rates.get(group.prompt.id, fmean(values))
                self.rates[group.prompt.id] = old + self.UPDATE * (fmean(values) - old)
        self.base = position

    def state(self) -> dict[str, Any]:
        return {"base": self.base, "rates": dict(self.rates)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.base, self.rates = state["base"], dict(state["rates"])

    def weight(self, name: str) -> float:
        rate, size = self.rates.get(name, 0.5), self.group_size
        return max(self.FLOOR, 1 - rate**size - (1 - rate) ** size)

    def _order(self, again: int) -> list[int]:
        """A random order in which the first places go by weight (Efraimidis and Spirakis, IPL 97, 2006)."""
        import numpy as np

        if getattr(self, "_cached", None) != (self.base, again):
            luck = np.random.default_rng([self.seed, self.base, again]).random(len(self.items))
            weights = np.array([self.weight(name) for name in self.names])
            self._cached, self._cached_order = (self.base, again), np.argsort(np.log(luck) / -weights).tolist()
        return self._cached_order


def start_rate(prompt: Prompt) -> float:
    """A row's `meta.pass_rate`: the share of rollouts of an earlier policy that were right."""
    rate = prompt.meta["pass_rate"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ConfigError(f"prompt {prompt.id!r}: meta.pass_rate must be a share from 0 to 1, got {rate!r}")
    return float(rate)


def make_stream(
    prompts: Sequence[Prompt], curriculum: str, seed: int, group_size: int, parts: Sequence[Part] = ()
) -> PromptStream[Prompt]:
    """parts: the sources of a mixture, () for one."""
    if curriculum == "pass_rate":
        return CurriculumStream(prompts, seed, group_size)
    return MixedStream(prompts, seed, parts) if parts else PromptStream(prompts, seed)

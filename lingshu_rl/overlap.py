"""A step's batch, collected when it is asked for or, with train.max_staleness=1, during the update before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lingshu_rl.processes.mainrank import cancelled

if TYPE_CHECKING:
    from lingshu_rl.run import Run

T = TypeVar("T")


class Ahead(Generic[T]):
    """Weights are sent only when the batch collected ahead is complete, so no sample mixes two versions and none is
    more than one update old.
    """

    def __init__(self, run: Run, collect: Callable[[Run, int], Coroutine[Any, Any, T]]) -> None:
        self.run, self.collect = run, collect
        self.pending: asyncio.Task[T] | None = None

    async def batch(self, step: int) -> T:
        pending, self.pending = self.pending, None
        return await self.run.on_main(lambda: pending or self.collect(self.run, step))

    @asynccontextmanager
    async def during(self, step: int) -> AsyncIterator[None]:
        """Around the update of `step`. The first batch is checked against the engine, so nothing runs ahead of it."""
        run = self.run
        if not run.config.train.max_staleness or not run.state.first_batch or step + 1 >= run.config.train.steps:
            yield
            return
        if run.is_main:
            self.pending = asyncio.create_task(self.collect(run, step + 1))
        try:
            yield
        except BaseException:
            await cancelled(self.pending)
            raise
        await run.on_main(self._settle, urgent=False)
        if self.pending is not None and not self.pending.done():
            await cancelled(self.pending)
            self.pending = None

    async def _settle(self) -> None:
        assert self.pending is not None
        await asyncio.wait({self.pending})

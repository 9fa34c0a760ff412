"""How the ranks stay together while only the main one has work: it works, they wait for its word and take part when
asked.

The main rank says one of: the result, an error, or "send these weights with me"; the others hear it in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from lingshu_rl.failures import RunStopped
from lingshu_rl.processes.fleet import Fleet
from lingshu_rl.processes.workers import Worker

T = TypeVar("T")
GRACE_S = 10.0  # how long SIGTERM lets a batch that runs ahead of its step come to its end; after twice that, a further
# SIGTERM ends the process without saving


class Preempted(RunStopped):
    """SIGTERM came: the run ends between two steps, with a checkpoint."""


class Ranks(Protocol):
    def share(self, value: Any) -> Any:
        """The main rank's value on every rank; a collective."""


class Stop:
    """SIGTERM ends the run between two steps; before there is a run, or when that takes too long, a further one at
    once.

    Launchers send it twice (from themselves, and by their death), so a second one soon after says nothing new.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.between_steps = False  # whether there is a run that looks at `asked`
        self._task, self._first = asyncio.current_task(), 0.0

    def listen(self) -> None:
        """Again after something else took the signal, as Ray does."""
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._terminate)

    def _terminate(self) -> None:
        self._first = self._first or time.monotonic()
        self.asked.set()
        if not self.between_steps or time.monotonic() - self._first > 2 * GRACE_S:
            assert self._task is not None
            self._task.cancel()


class MainRank:
    """All ranks hold one and call the same methods in the same order.

    give_weights: makes a server that was started again useful, all ranks taking part; given the worker on the main
    rank, and what `name_for_others` says of it on the others.
    """

    def __init__(
        self,
        ranks: Ranks,
        is_main: bool,
        fleet: Fleet,
        stop: Stop,
        give_weights: Callable[[Worker | None, Any], Awaitable[None]],
        name_for_others: Callable[[Worker], Any],
    ) -> None:
        self.ranks, self.is_main, self.fleet, self.stop = ranks, is_main, fleet, stop
        self.give_weights, self.name_for_others = give_weights, name_for_others

    async def run(self, work: Callable[[], Awaitable[T]], *, urgent: bool = True) -> T:
        """Run `work` on the main rank; every rank gets its result or its exception.

        Meanwhile a rollout server that was started again gets the weights, which all ranks may have to gather: those
        that wait here take part. SIGTERM and a server that is lost for good end the work with Preempted or WorkerError;
        with urgent=False that is left to the next call (the result is None), and SIGTERM waits GRACE_S for the work.
        """
        if not self.is_main:
            return await self._follow()
        task = asyncio.ensure_future(work())
        try:
            kind, value = await self._attend(task, urgent)
        except Exception as error:
            kind, value = "error", error
        finally:
            await cancelled(task)
        if kind == "error":
            common(value)
        self.ranks.share((kind, value))
        if kind == "error":
            raise value
        return value  # type: ignore[no-any-return]

    async def agree(self, work: Callable[[], Awaitable[None] | None]) -> None:
        """Work in which every rank has a part, and only the main one may find a fault: then all raise it.

        The others must come to the end of their part whatever the main one finds.
        """
        error: Exception | None = None
        try:
            if (rest := work()) is not None:
                await rest
        except Exception as fault:
            error = common(fault)
        if (told := self.ranks.share(error)) is not None:
            raise told

    async def _follow(self) -> Any:
        while True:
            kind, value = self.ranks.share(None)
            if kind == "weights":
                await self.give_weights(None, value)
            elif kind == "error":
                raise value
            else:
                return value

    async def _attend(self, task: asyncio.Future[T], urgent: bool) -> tuple[str, Any]:
        """How the task ended: ("value", result) or ("error", exception)."""
        wanted = asyncio.ensure_future(self.fleet.wanted.get())
        stop = asyncio.ensure_future(self._stop_after(0 if urgent else GRACE_S))
        lost = self.fleet.failure
        try:
            while True:
                waited: set[asyncio.Future[Any]] = {task, wanted, stop, *lost}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if any(failure.done() for failure in lost):
                    return ("error", next(iter(lost)).exception()) if urgent else ("value", None)
                if urgent and self.stop.asked.is_set():
                    return "error", Preempted("the run was stopped by SIGTERM")
                if wanted.done():
                    worker = wanted.result()
                    told = self.name_for_others(worker)
                    self.ranks.share(("weights", told))
                    await self.give_weights(worker, told)
                    wanted = asyncio.ensure_future(self.fleet.wanted.get())
                elif task.done():
                    error = task.exception()
                    return ("error", error) if error is not None else ("value", task.result())
                elif stop.done():
                    return "value", None
        finally:
            await cancelled(wanted)
            await cancelled(stop)

    async def _stop_after(self, grace_s: float) -> None:
        await self.stop.asked.wait()
        await asyncio.sleep(grace_s)


def common(error: Exception) -> Exception:
    """The exception, marked as one that every rank raises: all of them can go on to save, none is left in a
    collective."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


async def cancelled(task: asyncio.Future[Any] | None) -> None:
    """Cancel and wait; its exception, if any, is no longer of interest."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()

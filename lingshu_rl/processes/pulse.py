"""Whether a server gets on with its work, by a count of its own that moves. No clock tells a busy server from a stuck
one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
LOOKS = 10  # within the limit


@dataclass(frozen=True)
class Counter:
    """Where a server shows how much it has done. read: from the answer's text; ValueError where it holds no count."""

    path: str
    read: Callable[[str], float]


class Stalled(httpx.HTTPError):
    """A server made no progress for the whole limit; the message says what was seen instead."""


class Pulse:
    """One server's progress, looked at while requests are under way there.

    look: its count now; raises httpx.HTTPError or ValueError where there is none to see. An answer to any request is
    progress too.
    """

    def __init__(self, look: Callable[[], Awaitable[float]], limit_s: float) -> None:
        self.look, self.limit_s, self.look_s = look, limit_s, limit_s / LOOKS
        self.beats = 0  # times that progress was seen
        self.count: float | None = None
        self.seen = "it was not looked at"
        self._turn, self._looked, self._answered = asyncio.Lock(), -1.0, False

    async def wait(self, sending: Coroutine[Any, Any, T]) -> T:
        """The answer to a request, however long it takes while the server makes progress. Raises Stalled after
        `limit_s`."""
        answer, stall = asyncio.create_task(sending), asyncio.create_task(self._stall())
        try:
            await asyncio.wait({answer, stall}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Stalled(stall.result())
            result = answer.result()
            self.beats += 1
            return result
        finally:
            for task in (answer, stall):
                task.cancel()
            await asyncio.gather(answer, stall, return_exceptions=True)

    async def _stall(self) -> str:
        """Returns, with what was seen, once the looks of `limit_s` in a row have shown no progress."""
        silent_s, beats, clock = 0.0, self.beats, asyncio.get_running_loop().time
        while silent_s < self.limit_s:
            began = clock()
            await asyncio.sleep(self.look_s)
            # An update that holds this process's loop is no silence of the server: one look counts as one.
            longest = self.look_s if await self._look() else self.look_s + self.patience_s
            silent_s += min(clock() - began, longest)
            if self.beats != beats:
                silent_s, beats = 0.0, self.beats
        return f"no progress for {self.limit_s:g} s: {self.seen}"

    async def _look(self) -> bool:
        """Whether a count was seen. One look for all that wait: who comes while another looks takes what that one
        saw."""
        clock = asyncio.get_running_loop().time
        asked = clock()
        async with self._turn:
            if self._looked <= asked:
                self._answered = await self._look_now()
                self._looked = clock()
            return self._answered

    async def _look_now(self) -> bool:
        try:
            count = await self.look()
        except (httpx.HTTPError, ValueError) as error:
            self.seen = f"{type(error).__name__}: {error}"
            return False
        self.seen = f"it answers, but its count of work done stands at {count:g}"
        if count != self.count:
            self.beats += 1
            self.count = count
        return True

    @property
    def patience_s(self) -> float:
        """How long one look may take."""
        return min(self.limit_s / 3, 10.0)

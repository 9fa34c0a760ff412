"""Work in threads and tasks, whose exceptions reach the one who waits, at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread`, also for work that raises StopIteration, as a processor does when it runs out of images.

    asyncio cannot put a StopIteration into a future: whoever awaits it would wait for ever.
    """

    def whole() -> T:
        try:
            return work(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError(f"{getattr(work, '__qualname__', work)} raised StopIteration") from error

    return await asyncio.to_thread(whole)


async def while_well(items: AsyncIterator[T], tasks: Callable[[], Iterable[asyncio.Task[Any]]]) -> AsyncIterator[T]:
    """The items as they come. A task that fails meanwhile ends the wait for the next one with its exception."""

    async def following() -> list[T]:
        try:
            return [await anext(items)]
        except StopAsyncIteration:
            return []

    coming = asyncio.ensure_future(following())
    try:
        while True:
            under_way = {coming, *(task for task in tasks() if not task.done())}
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks():
                if task.done():
                    task.result()
            if not coming.done():
                continue
            if not (found := coming.result()):
                return
            yield found[0]
            coming = asyncio.ensure_future(following())
    finally:
        coming.cancel()

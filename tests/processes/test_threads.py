"""A failure anywhere in a step reaches the one who waits, also while others have nothing to say yet."""

import asyncio

import pytest

from lingshu_rl.processes.threads import in_thread, while_well


def test_a_stop_iteration_in_a_thread_does_not_hang_the_one_who_waits():
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(in_thread(next, iter(())), 20))


async def slow(items, never):
    for item in items:
        yield item
    if never:
        await asyncio.Event().wait()


async def taken(never, failing):
    async def fail():
        raise KeyError("row n3")

    got, tasks = [], []
    async for item in while_well(slow([1, 2], never), lambda: tasks):
        got.append(item)
        if failing:
            tasks.append(asyncio.create_task(fail()))
    return got


def test_all_items_come_when_nothing_fails():
    assert asyncio.run(taken(never=False, failing=False)) == [1, 2]


def test_a_task_that_fails_ends_the_wait_for_an_item_that_never_comes():
    with pytest.raises(KeyError, match="row n3"):
        asyncio.run(asyncio.wait_for(taken(never=True, failing=True), 20))

"""Turns: one at a time, the tenant that took the least first, and nobody queues without bound."""

from __future__ import annotations

import asyncio

import pytest

from server.adapters.turns import TooManyWaiting, Turns


async def work(turns: Turns, tenant: str, done: list[str], seconds: float = 0.001) -> None:
    async with turns.of(tenant):
        await asyncio.sleep(seconds)
        done.append(tenant)


async def test_a_tenant_with_much_to_do_holds_nobody_up() -> None:
    turns, done = Turns(16), list[str]()
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(work(turns, "hog", done, 0.02))
        await asyncio.sleep(0)
        for tenant in ("a", "b", "a", "b"):
            group.create_task(work(turns, tenant, done))
    assert done[:5].count("hog") == 1, done
    assert done[5:] == ["hog"] * 7


async def test_time_away_is_not_saved_up() -> None:
    turns, done = Turns(16), list[str]()
    await work(turns, "late", done)
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(work(turns, "busy", done, 0.01))
        await asyncio.sleep(0.025)
        for _ in range(4):
            group.create_task(work(turns, "late", done, 0.01))
    assert "busy" in done[4:7], done


async def test_a_tenant_may_not_queue_without_bound() -> None:
    turns, done = Turns(2), list[str]()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(work(turns, "a", done))
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaiting) as caught:
            await work(turns, "a", done)
        group.create_task(work(turns, "b", done))
    assert caught.value.retry_after_s >= 1
    assert sorted(done) == ["a", "a", "a", "b"]


async def test_callers_that_go_away_leave_no_hole() -> None:
    turns, done = Turns(8), list[str]()
    holder = asyncio.create_task(work(turns, "a", done, 0.01))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(work(turns, tenant, done)) for tenant in ("b", "b", "c")]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await holder
    # The next one has its turn now, and does not know it yet.
    waiting[1].cancel()
    await asyncio.wait(waiting)
    await asyncio.wait_for(work(turns, "a", done), 1)
    assert done == ["a", "c", "a"]


async def test_one_that_fails_passes_its_turn_on() -> None:
    turns = Turns(1)
    with pytest.raises(RuntimeError, match="broke"):
        async with turns.of("a"):
            raise RuntimeError("broke")
    await asyncio.wait_for(work(turns, "b", []), 1)

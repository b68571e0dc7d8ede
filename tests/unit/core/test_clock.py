"""Clocks."""

from __future__ import annotations

import asyncio
from datetime import UTC

from stoker_core.clock import ManualClock, SystemClock


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(start_s=100.0)
    assert (clock.monotonic_s(), clock.utc().timestamp(), clock.utc().tzinfo) == (100.0, 100.0, UTC)
    clock.advance(2.5)
    assert (clock.monotonic_s(), clock.utc().timestamp()) == (102.5, 102.5)


async def test_sleepers_wake_in_the_order_of_their_ends() -> None:
    clock, woken = ManualClock(), []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleeper(s)) for s in (3.0, 1.0, 2.0, 9.0)]
    await settle()
    clock.advance(0.5)
    await settle()
    assert woken == []
    clock.advance(2.5)
    await settle()
    assert woken == [1.0, 2.0, 3.0]
    clock.advance(6.0)
    await asyncio.gather(*tasks)
    assert woken[-1] == 9.0


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(1.0))
    await settle()
    task.cancel()
    await asyncio.wait([task])
    clock.advance(5.0)
    assert task.cancelled()


def test_the_system_clock_never_goes_back_and_knows_utc() -> None:
    clock = SystemClock()
    assert clock.monotonic_s() <= clock.monotonic_s()
    assert clock.utc().tzinfo is UTC

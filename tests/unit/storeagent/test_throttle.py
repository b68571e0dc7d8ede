from __future__ import annotations

import asyncio

import pytest

from stoker_core.clock import ManualClock
from stoker_storeagent.throttle import BURST_S, Throttle

RATE = 1_000_000


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Taker:
    """Takes pieces for ever, and counts."""

    def __init__(self, throttle: Throttle, piece: int) -> None:
        self.bytes = 0
        self._throttle, self._piece = throttle, piece
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._throttle.take(self._piece)
            self.bytes += self._piece


async def stop(*takers: Taker) -> None:
    for taker in takers:
        taker.task.cancel()
    await asyncio.wait([taker.task for taker in takers])


async def run(clock: ManualClock, seconds: float, step_s: float) -> None:
    for _ in range(round(seconds / step_s)):
        clock.advance(step_s)
        await settle_all()


async def settle_all() -> None:
    # A step lets through several pieces, each of which takes a few turns of the loop.
    for _ in range(40):
        await asyncio.sleep(0)


@pytest.mark.parametrize("piece", [1_000, 3_333, 40_000, 200_000])
async def test_the_rate_is_kept_to_within_three_percent_over_seconds(piece: int) -> None:
    clock, step_s = ManualClock(), 0.003
    taker = Taker(Throttle(RATE, clock), piece)
    await settle()
    await run(clock, 1.0, step_s)
    before = taker.bytes
    await run(clock, 3.0, step_s)
    await stop(taker)
    assert taker.bytes - before == pytest.approx(3 * RATE, rel=0.03, abs=piece)


async def test_late_timers_do_not_lower_the_rate() -> None:
    clock = ManualClock()
    taker = Taker(Throttle(RATE, clock), 10_000)
    await settle()
    await run(clock, 6.0, 0.04)  # every sleep of 10 ms takes 40
    await stop(taker)
    assert taker.bytes == pytest.approx(6 * RATE, rel=0.03)


async def test_after_a_rest_only_a_burst_goes_at_once() -> None:
    clock = ManualClock()
    throttle = Throttle(RATE, clock)
    clock.advance(3600)
    taker = Taker(throttle, 1_000)
    await settle_all()
    await settle_all()
    await stop(taker)
    assert taker.bytes == pytest.approx(BURST_S * RATE, abs=1_000)


async def test_those_who_wait_go_in_the_order_in_which_they_came() -> None:
    clock, went = ManualClock(), []
    throttle = Throttle(RATE, clock)

    async def take(name: str, size: int) -> None:
        await throttle.take(size)
        went.append(name)

    tasks = [asyncio.create_task(take(name, size)) for name, size in (("big", 500_000), ("small", 1), ("mid", 100_000))]
    await run(clock, 0.4, 0.05)
    assert went == []
    await run(clock, 1.0, 0.05)
    await asyncio.gather(*tasks)
    assert went == ["big", "small", "mid"]


async def test_two_who_take_together_get_the_same_share() -> None:
    clock = ManualClock()
    throttle = Throttle(RATE, clock)
    one, other = Taker(throttle, 10_000), Taker(throttle, 10_000)
    await settle()  # the first takes the burst
    ahead = one.bytes - other.bytes
    await run(clock, 2.0, 0.01)
    await stop(one, other)
    assert one.bytes - other.bytes == pytest.approx(ahead, abs=10_000)


async def test_who_gives_up_waiting_has_taken_nothing() -> None:
    clock = ManualClock()
    throttle = Throttle(RATE, clock)
    given_up = asyncio.create_task(throttle.take(60 * RATE))
    await settle()
    next_one = asyncio.create_task(throttle.take(100_000))
    await settle()
    given_up.cancel()
    await settle()
    clock.advance(0.1)
    await asyncio.wait_for(next_one, 1)


async def test_no_limit_costs_no_wait() -> None:
    await asyncio.wait_for(Throttle(0, ManualClock()).take(1 << 60), 1)

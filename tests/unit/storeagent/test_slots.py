import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.virtual_time import in_virtual_time, steps

from stoker_storeagent.slots import RANK_START, Slots, Turn

Rank = tuple[int, int, float]
LOW, HIGH = (1, 0, 5.0), (1, -3, 9.0)


class Crowd:
    """Tasks that take a slot and keep it until they are told to give it back."""

    def __init__(self, count: int) -> None:
        self.slots, self.count = Slots(count), count
        self.has: list[str] = []
        self.most = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._done: dict[str, asyncio.Event] = {}

    def come(self, name: str, turn: Turn | None = None) -> None:
        self._done[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._take(name, turn or Turn()))

    async def _take(self, name: str, turn: Turn) -> None:
        async with self.slots.taken(turn):
            self.has.append(name)
            self.most = max(self.most, len(self.has))
            try:
                await self._done[name].wait()
            finally:
                self.has.remove(name)

    def leave(self, name: str) -> None:
        self._done[name].set()

    async def drain(self) -> list[str]:
        """Let everybody who still waits have it, one after the other. Returns their order."""
        order = []
        while self.has:
            order.append(self.has[0])
            self.leave(self.has[0])
            await steps(4)
        return order

    async def all_free(self) -> bool:
        """Whether as many as there are slots get one at once."""
        assert not self.has
        for number in range(self.count + 1):
            self.come(f"last {number}")
        await steps(4)
        got = len(self.has)
        await self.drain()
        return got == self.count and self.slots.waiting == 0


@in_virtual_time
async def test_no_more_than_there_are_slots_have_one() -> None:
    crowd = Crowd(2)
    for name in "abc":
        crowd.come(name)
    await steps(4)
    assert crowd.has == ["a", "b"]
    assert crowd.slots.waiting == 1
    crowd.leave("a")
    await steps(4)
    assert crowd.has == ["b", "c"]
    await crowd.drain()
    assert await crowd.all_free()


@in_virtual_time
async def test_a_start_goes_before_prefetches_that_wait_for_longer_and_these_by_priority_then_deadline() -> None:
    crowd = Crowd(1)
    crowd.come("first")
    await steps(2)
    for name, rank in {
        "low": LOW,
        "late": (1, -3, 10.0),
        "high": HIGH,
        "also high": HIGH,
        "start": RANK_START,
    }.items():
        crowd.come(name, Turn(rank))
        await steps(2)
    assert await crowd.drain() == ["first", "start", "high", "also high", "late", "low"]


@in_virtual_time
async def test_who_waits_may_be_hastened_but_never_put_off() -> None:
    crowd = Crowd(1)
    hastened, other = Turn(LOW), Turn(HIGH)
    crowd.come("first")
    await steps(2)
    crowd.come("other", other)
    crowd.come("hastened", hastened)
    await steps(2)
    hastened.hasten(RANK_START)
    hastened.hasten(LOW)
    assert hastened.starting
    assert await crowd.drain() == ["first", "hastened", "other"]


@in_virtual_time
async def test_a_slot_that_was_just_given_to_one_who_is_cancelled_goes_to_the_next() -> None:
    crowd = Crowd(1)
    for name in "abc":
        crowd.come(name)
    await steps(4)
    crowd.leave("a")
    while crowd.has:
        await asyncio.sleep(0)
    crowd.tasks["b"].cancel()  # before it could take its step
    await steps(4)
    assert crowd.has == ["c"]
    await crowd.drain()
    assert await crowd.all_free()


@in_virtual_time
async def test_one_who_is_cancelled_in_the_same_step_as_a_slot_comes_free_does_not_take_it_along() -> None:
    crowd = Crowd(1)
    for name in "abc":
        crowd.come(name)
    await steps(4)
    crowd.tasks["b"].cancel()
    crowd.tasks["a"].cancel()
    await steps(4)
    assert crowd.has == ["c"]
    await crowd.drain()
    assert await crowd.all_free()


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["come", "cancel", "leave"]), st.integers(0, 5), st.integers(0, 3)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3), actions=ACTIONS)
@in_virtual_time
async def test_whenever_waiters_are_cancelled_no_slot_is_lost_or_given_twice(
    count: int, actions: list[tuple[str, int, int]]
) -> None:
    crowd, come = Crowd(count), 0
    for action, which, pause in actions:
        if action == "come":
            crowd.come(str(come), Turn((which % 2, -which, 0.0)))
            come += 1
        elif come:
            name = str(which % come)
            if action == "cancel":
                crowd.tasks[name].cancel()
            else:
                crowd.leave(name)
        await steps(pause)
    await steps(4)
    await crowd.drain()
    outcomes = await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    assert crowd.most <= count
    assert await crowd.all_free()


@in_virtual_time
async def test_an_error_gives_the_slot_back() -> None:
    slots = Slots(1)
    with pytest.raises(ValueError):
        async with slots.taken(Turn()):
            raise ValueError
    async with asyncio.timeout(1), slots.taken(Turn()):
        pass

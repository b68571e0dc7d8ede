"""The event loop in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from stoker_sim.dice import Dice
from stoker_sim.loop import Deadlock, Killed, Process, SimClock, SimLoop, crash_point, sim_loop


def traced(work: Callable[[SimLoop], Coroutine[Any, Any, object]]) -> tuple[object, str]:
    with sim_loop() as loop:
        return loop.run(work(loop)), loop.trace


def test_hours_pass_in_no_time() -> None:
    with sim_loop() as loop:
        loop.run(asyncio.sleep(36_000))
        assert loop.time() == 36_000


def test_the_clock_is_the_loops() -> None:
    with sim_loop() as loop:
        clock = SimClock(loop)
        loop.run(clock.sleep(90))
        assert (clock.monotonic_s(), clock.utc().timestamp()) == (90, 90)


def test_what_is_ready_runs_in_order_and_timers_of_one_moment_by_when_they_were_set() -> None:
    said: list[str] = []

    async def work(loop: SimLoop) -> None:
        loop.call_later(1.0, said.append, "second timer")
        loop.call_later(0.5, said.append, "first timer")
        loop.call_later(1.0, said.append, "third timer")
        loop.call_soon(said.append, "one")
        loop.call_soon(said.append, "two")
        await asyncio.sleep(2)

    traced(work)
    assert said == ["one", "two", "first timer", "second timer", "third timer"]


def test_a_timer_that_was_cancelled_neither_runs_nor_moves_time() -> None:
    said: list[str] = []

    async def work(loop: SimLoop) -> None:
        loop.call_later(5.0, said.append, "never").cancel()
        await asyncio.sleep(1)

    with sim_loop() as loop:
        loop.run(work(loop))
        assert (said, loop.time()) == ([], 1.0)


def test_tasks_that_wait_for_one_another_are_a_deadlock_and_not_a_hang() -> None:
    with sim_loop() as loop, pytest.raises(Deadlock):
        loop.run(asyncio.Event().wait())


async def crowd(seed: int) -> list[int]:
    """Many tasks in groups, which asyncio keeps in sets."""
    dice, done = Dice(seed), []

    async def one(number: int) -> None:
        await asyncio.sleep(dice.delay_s(0.1))
        done.append(number)
        if number == 40:
            raise ValueError

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one(number))
    except* ValueError:
        pass
    async with asyncio.timeout(10):
        await asyncio.wait([asyncio.ensure_future(one(number)) for number in range(41, 80)])
    return done


def test_the_same_seed_has_the_same_trace_and_another_one_another() -> None:
    first, again, other = (traced(lambda _, seed=seed: crowd(seed)) for seed in (1, 1, 2))  # type: ignore[misc]
    assert first == again
    assert first[1] != other[1]


def test_there_are_no_threads_and_no_sockets() -> None:
    async def work(loop: SimLoop) -> None:
        with pytest.raises(RuntimeError, match="threads"):
            await asyncio.to_thread(len, "")
        with pytest.raises(NotImplementedError):
            loop.add_reader(0, len)

    traced(work)


def test_whoever_is_killed_runs_no_finally_and_leaves_the_others_alone() -> None:
    said: list[str] = []

    async def inner(name: str) -> None:
        try:
            await asyncio.sleep(1)
            said.append(f"{name} ends")
        finally:
            said.append(f"{name} cleans up")
            await asyncio.sleep(1)

    async def work(name: str) -> None:
        async with asyncio.TaskGroup() as group:
            for number in (1, 2):
                group.create_task(inner(f"{name} {number}"))

    with sim_loop() as loop:
        doomed, lucky = Process("doomed"), Process("lucky")
        loop.spawn(doomed, work("doomed"))
        loop.spawn(lucky, work("lucky"))
        loop.later(0.5, doomed.kill)
        loop.run_for(10)
        assert said == ["lucky 1 ends", "lucky 1 cleans up", "lucky 2 ends", "lucky 2 cleans up"]
        assert loop.tasks_of(lucky) == []
        assert len(loop.tasks_of(doomed)) == 3
        assert loop.complaints == []


def test_a_dead_process_is_woken_by_nobody() -> None:
    said: list[str] = []

    async def waits(event: asyncio.Event) -> None:
        await event.wait()
        said.append("woken")

    with sim_loop() as loop:
        process, event = Process("p"), asyncio.Event()
        loop.spawn(process, waits(event))
        loop.run_for(1)
        process.kill()
        event.set()
        loop.run_for(1)
        assert said == []


def test_a_crash_point_kills_in_the_midst_of_code_that_does_not_wait() -> None:
    said: list[str] = []

    async def work() -> None:
        said.append("before")
        crash_point("here")
        said.append("after")

    with sim_loop() as loop:
        process = Process("p")
        process.doom = "here"
        loop.spawn(process, work())
        loop.run_for(1)
        assert (said, process.alive) == (["before"], False)


def test_what_a_dead_process_still_unwinds_gets_no_further_than_a_crash_point() -> None:
    said: list[str] = []

    async def work() -> None:
        try:
            crash_point("here")
        finally:
            crash_point("anything")
            said.append("after")

    with sim_loop() as loop:
        process = Process("p")
        process.doom = "here"
        task = loop.spawn(process, work())
        loop.run_for(1)
        assert said == []
        assert isinstance(task.exception(), Killed)


def test_others_hear_of_a_death_once() -> None:
    told: list[str] = []
    process = Process("p")
    process.on_death(lambda: told.append("one"))
    process.on_death(lambda: told.append("two"))()
    process.kill()
    process.kill()
    assert told == ["one"]


def test_dice_are_the_same_everywhere_and_their_streams_do_not_touch() -> None:
    assert Dice(7).bytes(12).hex() == "9965a49dbe28d4cf36e039b3"
    left, right = Dice(7).child("left"), Dice(7).child("right")
    drawn = right.unit()
    assert left.unit() != drawn
    assert Dice(7).child("right").unit() == drawn
    assert all(0 <= left.delay_s(1.0) <= 8.0 for _ in range(1000))

"""Running a service: parts, an orderly stop, loops, and exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

import pytest
import structlog

from stoker_core.clock import ManualClock
from stoker_core.errors import DatabaseUnavailable, InvalidMessage, StokerError
from stoker_core.runner import Part, every, main, run_parts
from stoker_core.settings import SharedSettings

DRAIN_S = 30.0


class Journal:
    """Parts that write down what happens to them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def part(self, name: str, *, drain: Callable[[], Awaitable[None]] | None = None) -> Part:
        async def run() -> None:
            self.lines.append(f"{name} runs")
            try:
                await asyncio.Event().wait()
            finally:
                self.lines.append(f"{name} cancelled")

        async def drained() -> None:
            self.lines.append(f"{name} drains")
            if drain:
                await drain()
            self.lines.append(f"{name} drained")

        return Part(name, run, stop_intake=lambda: self.lines.append(f"{name} stops intake"), drain=drained)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_stop_first_ends_intake_everywhere_then_drains_then_cancels() -> None:
    journal, stop = Journal(), asyncio.Event()
    running = asyncio.create_task(run_parts([journal.part("a"), journal.part("b")], stop, drain_s=DRAIN_S))
    await settle()
    assert journal.lines == ["a runs", "b runs"]
    stop.set()
    await running
    assert journal.lines[2:4] == ["a stops intake", "b stops intake"]
    assert sorted(journal.lines[4:8]) == ["a drained", "a drains", "b drained", "b drains"]
    assert sorted(journal.lines[8:]) == ["a cancelled", "b cancelled"]


async def test_parts_go_on_running_while_others_drain() -> None:
    journal, stop, finish = Journal(), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(
        run_parts([journal.part("slow", drain=lambda: ignore(finish.wait())), journal.part("b")], stop, drain_s=DRAIN_S)
    )
    await settle()
    stop.set()
    await settle()
    assert "b drained" in journal.lines
    assert not any("cancelled" in line for line in journal.lines)
    finish.set()
    await running
    assert journal.lines.index("slow drained") < journal.lines.index("b cancelled")


async def ignore(awaitable: Awaitable[object]) -> None:
    await awaitable


async def test_a_part_that_fails_ends_all_and_its_error_comes_out() -> None:
    journal, stop = Journal(), asyncio.Event()

    async def fail() -> None:
        await settle()
        raise InvalidMessage("broken")

    with pytest.raises(ExceptionGroup) as caught:
        await run_parts([journal.part("a"), Part("b", fail)], stop, drain_s=DRAIN_S)
    assert caught.group_contains(InvalidMessage, match="broken")
    assert journal.lines == ["a runs", "a cancelled"]


async def test_a_part_that_returns_by_itself_is_an_error_that_names_it() -> None:
    async def leave() -> None: ...

    with pytest.raises(ExceptionGroup) as caught:
        await run_parts([Journal().part("a"), Part("leaver", leave)], asyncio.Event(), drain_s=DRAIN_S)
    assert caught.group_contains(RuntimeError, match="leaver ended by itself")


async def test_a_part_may_return_once_the_stop_has_come() -> None:
    stop = asyncio.Event()

    async def until_stop() -> None:
        await stop.wait()

    running = asyncio.create_task(run_parts([Part("a", until_stop)], stop, drain_s=DRAIN_S))
    await settle()
    stop.set()
    await running


async def test_a_drain_that_takes_too_long_is_cut_short() -> None:
    journal, stop = Journal(), asyncio.Event()
    stop.set()
    await run_parts(
        [journal.part("stuck", drain=lambda: ignore(asyncio.Event().wait())), journal.part("quick")], stop, drain_s=0.01
    )
    assert "quick drained" in journal.lines
    assert "stuck drained" not in journal.lines
    assert journal.lines[-1].endswith("cancelled")


async def test_a_drain_that_fails_does_not_hinder_the_others() -> None:
    journal, stop = Journal(), asyncio.Event()

    async def broken() -> None:
        raise DatabaseUnavailable()

    stop.set()
    await run_parts([journal.part("a", drain=broken), journal.part("b")], stop, drain_s=DRAIN_S)
    assert "b drained" in journal.lines
    assert "a cancelled" in journal.lines


async def test_a_part_that_fails_while_others_drain_leaves_no_drain_behind() -> None:
    journal, stop, fail = Journal(), asyncio.Event(), asyncio.Event()
    before = asyncio.all_tasks()

    async def failing() -> None:
        await fail.wait()
        raise InvalidMessage("broken")

    running = asyncio.create_task(
        run_parts(
            [journal.part("a", drain=lambda: ignore(asyncio.Event().wait())), Part("b", failing)], stop, drain_s=DRAIN_S
        )
    )
    await settle()
    stop.set()
    await settle()
    assert "a drains" in journal.lines
    fail.set()
    with pytest.raises(ExceptionGroup):
        await running
    await settle()
    assert asyncio.all_tasks() == before


async def test_cancelling_from_outside_cancels_the_parts() -> None:
    journal = Journal()
    running = asyncio.create_task(run_parts([journal.part("a")], asyncio.Event(), drain_s=DRAIN_S))
    await settle()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert journal.lines == ["a runs", "a cancelled"]


async def test_a_loop_acts_at_once_and_then_at_every_interval() -> None:
    clock, turns = ManualClock(), 0

    async def action() -> None:
        nonlocal turns
        turns += 1

    loop = asyncio.create_task(every(5.0, action, clock, name="test"))
    await settle()
    assert turns == 1
    clock.advance(4.9)
    await settle()
    assert turns == 1
    clock.advance(0.1)
    await settle()
    assert turns == 2
    loop.cancel()


async def test_a_loop_goes_on_after_a_retryable_error() -> None:
    clock, turns = ManualClock(), 0

    async def action() -> None:
        nonlocal turns
        turns += 1
        if turns < 3:
            raise DatabaseUnavailable()

    loop = asyncio.create_task(every(1.0, action, clock, name="test"))
    for expected in (1, 2, 3, 4):
        await settle()
        assert turns == expected
        clock.advance(1.0)
    loop.cancel()


@pytest.mark.parametrize("error", [InvalidMessage("no use to try again"), RuntimeError("a mistake")])
async def test_a_loop_ends_with_any_other_error(error: Exception) -> None:
    async def action() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await every(1.0, action, ManualClock(), name="test")


async def test_a_wake_starts_the_next_turn_at_once_and_is_not_lost_during_one() -> None:
    wake, turns = asyncio.Event(), 0

    async def action() -> None:
        nonlocal turns
        turns += 1
        if turns == 2:
            wake.set()

    loop = asyncio.create_task(every(3600.0, action, ManualClock(), name="test", wake=wake))
    await settle()
    assert turns == 1
    wake.set()
    await settle()
    assert turns == 3
    loop.cancel()


class Settings(SharedSettings, frozen=True):
    SCOPE = "test"
    size: int = 1


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """main() configures logs for its process; this process wants its own back."""
    for key in [key for key in os.environ if key.startswith("STOKER_")]:
        monkeypatch.delenv(key)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield monkeypatch
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_stops_on_a_signal(clean_process: pytest.MonkeyPatch, number: signal.Signals) -> None:
    seen: list[int] = []

    async def serve(settings: Settings, stop: asyncio.Event) -> None:
        seen.append(settings.size)
        os.kill(os.getpid(), number)
        await stop.wait()

    clean_process.setenv("STOKER_TEST_SIZE", "3")
    main("test", Settings, serve)
    assert seen == [3]


def test_bad_settings_exit_with_2_and_are_named(
    clean_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(_: Settings, __: asyncio.Event) -> None:
        raise AssertionError("must not run")

    clean_process.setenv("STOKER_TEST_SIZE", "many")
    with pytest.raises(SystemExit) as caught:
        main("test", Settings, serve)
    assert caught.value.code == 2
    assert "STOKER_TEST_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "traceback"), [(DatabaseUnavailable("gone"), False), (ValueError("a mistake"), True)]
)
def test_a_failure_exits_with_1_and_is_logged(
    clean_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, traceback: bool
) -> None:
    async def fail() -> None:
        raise error

    async def serve(_: Settings, stop: asyncio.Event) -> None:
        await run_parts([Part("a", fail)], stop, drain_s=DRAIN_S)

    with pytest.raises(SystemExit) as caught:
        main("test", Settings, serve)
    assert caught.value.code == 1
    log = capsys.readouterr().err
    assert "service_failed" in log
    assert str(error) in log
    assert ("Traceback" in log) is traceback
    assert isinstance(error, StokerError) is not traceback

"""Run a service: named tasks, and an orderly stop (no new work, then drain, then cancel)."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stoker_core.clock import Clock
from stoker_core.errors import InvalidSettings, StokerError
from stoker_core.logging import get_logger, setup_logging
from stoker_core.settings import SharedSettings, load, masked
from stoker_core.tracing import setup_tracing

log = get_logger("runner")

S = TypeVar("S", bound=SharedSettings)


@dataclass(frozen=True)
class Part:
    """One long-running task of a service.

    run: works until cancelled; returning or raising ends the whole service.
    stop_intake: takes no new work from now on; must not block.
    drain: returns once the work in hand is finished. Bounded by the service's `drain_s`.
    """

    name: str
    run: Callable[[], Awaitable[None]]
    stop_intake: Callable[[], None] | None = None
    drain: Callable[[], Awaitable[None]] | None = None


async def run_parts(parts: Sequence[Part], stop: asyncio.Event, *, drain_s: float) -> None:
    """Run all parts until `stop` is set or one of them ends; then stop intake, drain, cancel.

    Raises the first failure of a part (as an ExceptionGroup), or RuntimeError if one returned early.
    """

    async def guarded(part: Part) -> None:
        await part.run()
        if not stop.is_set():
            raise RuntimeError(f"{part.name} ended by itself")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guarded(part), name=part.name) for part in parts]
        await stop.wait()
        for part in parts:
            if part.stop_intake:
                part.stop_intake()
        await _drain(parts, drain_s)
        for task in tasks:
            task.cancel()


async def _drain(parts: Sequence[Part], drain_s: float) -> None:
    drains = [asyncio.ensure_future(part.drain()) for part in parts if part.drain]
    if not drains:
        return
    try:
        _, late = await asyncio.wait(drains, timeout=drain_s)
    finally:
        for drain in drains:  # also those that a crashing part leaves behind
            drain.cancel()
    for outcome in await asyncio.gather(*drains, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.warning("drain_failed", error=str(outcome))
    if late:
        log.warning("drain_timeout", drain_s=drain_s, unfinished=len(late))


async def every(
    interval_s: float,
    action: Callable[[], Awaitable[None]],
    clock: Clock,
    *,
    name: str,
    wake: asyncio.Event | None = None,
) -> None:
    """Call `action` now and then every `interval_s`, or as soon as `wake` is set.

    A retryable StokerError is logged and tried again at the next turn; anything else ends the service.
    """
    failing = False
    while True:
        if wake is not None:
            wake.clear()
        try:
            await action()
            if failing:
                log.info("loop_recovered", loop=name)
            failing = False
        except StokerError as error:
            if not error.retryable:
                raise
            if not failing:
                log.warning("loop_failing", loop=name, code=error.code, error=error.message)
            failing = True
        if wake is None:
            await clock.sleep(interval_s)
        else:
            try:
                async with asyncio.timeout(interval_s):
                    await wake.wait()
            except TimeoutError:
                pass


def main(service: str, settings_type: type[S], serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    """Environment → settings → `serve(settings, stop)` until SIGTERM or SIGINT. Exits 2 on bad settings, 1 on a failure."""
    try:
        settings = load(settings_type)
        setup_logging(service, level=settings.log_level, log_format=settings.log_format, node=settings.node)
    except InvalidSettings as error:
        sys.stderr.write(f"stoker {service}: {error.message}\n")
        raise SystemExit(2) from error
    setup_tracing(service, **{"stoker.node": settings.node})

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info("service_starting", settings=masked(settings))
        await serve(settings, stop)

    try:
        asyncio.run(run())
    except Exception as error:
        for leaf in _leaves(error):
            expected = isinstance(leaf, StokerError)
            log.error("service_failed", error=str(leaf), kind=type(leaf).__name__, exc_info=None if expected else leaf)
        raise SystemExit(1) from error
    log.info("service_stopped")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]

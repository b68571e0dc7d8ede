"""Blocking work in threads that can be told to stop, and is never left behind."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

R = TypeVar("R")


async def in_thread(work: Callable[[], R], cancelled: threading.Event) -> R:
    """Run `work` in a thread. On cancellation set `cancelled` and wait until the thread has seen it.

    Only then may the caller remove the files that the thread writes.
    """
    return await _awaited(asyncio.ensure_future(asyncio.to_thread(work)), cancelled.set)


async def to_its_end(work: Coroutine[Any, Any, R]) -> R:
    """Run `work` as a task of its own. On cancellation wait until it is done."""
    return await _awaited(asyncio.ensure_future(work))


class Threads:
    """At most `count` threads for work of one kind, so that it does not take all those that asyncio has for everything.

    For one event loop. Work beyond that waits in the coroutines that ask for it, and is taken in their order.
    """

    def __init__(self, count: int, name: str) -> None:
        self._free = asyncio.Semaphore(count)
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, work: Callable[[], R]) -> R:
        """Run `work` in a thread. On cancellation wait until it is done with it: work here is short."""
        async with self._free:
            context = contextvars.copy_context()
            return await _awaited(asyncio.get_running_loop().run_in_executor(self._executor, context.run, work))

    def close(self) -> None:
        """Wait for the threads to end; nothing can be run any more. Idempotent."""
        self._executor.shutdown()


async def _awaited(running: asyncio.Future[R], on_cancel: Callable[[], None] | None = None) -> R:
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        while not running.done():
            with suppress(asyncio.CancelledError):  # once more: the thread is not done for that
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen: the cancellation is what the caller hears of
        raise

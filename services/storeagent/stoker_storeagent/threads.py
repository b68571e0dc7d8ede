"""Blocking work in threads that can be told to stop, and is never left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


async def in_thread(work: Callable[[], R], cancelled: threading.Event) -> R:
    """Run `work` in a thread. On cancellation set `cancelled` and wait until the thread has seen it.

    Only then may the caller remove the files that the thread writes.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen: the cancellation is what the caller hears of
        raise

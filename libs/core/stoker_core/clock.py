"""Time as an injected part, so that policy and protocols can be tested and simulated without waiting."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin; never goes back. For durations."""
        ...

    def utc(self) -> datetime:
        """Wall-clock time, for records that people read. Never compared between machines."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def utc(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that moves only when told to. `sleep` returns once `advance` has passed its end."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic_s(self) -> float:
        return self._now_s

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self._now_s, UTC)

    async def sleep(self, seconds: float) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now_s + seconds, done))
        await done

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        due = [s for s in self._sleepers if s[0] <= self._now_s]
        self._sleepers = [s for s in self._sleepers if s[0] > self._now_s]
        for _, done in sorted(due, key=lambda s: s[0]):
            if not done.done():
                done.set_result(None)

"""A bound on bandwidth."""

from __future__ import annotations

import asyncio

from stoker_core.clock import Clock

BURST_S = 0.05
"""What may go at once after a rest. It also makes up for timers that come late."""


class Throttle:
    """At most bytes_per_s (0: no limit), shared by all who take from it, in the order in which they ask.

    In any t seconds at most bytes_per_s × (t + BURST_S) bytes are let through.
    """

    def __init__(self, bytes_per_s: int, clock: Clock) -> None:
        assert bytes_per_s >= 0, "a bound is not negative"
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._paid_s = -BURST_S  # when all that was let through is paid for
        self._turn = asyncio.Lock()  # wakes those who wait in their order

    async def take(self, size_bytes: int) -> None:
        """Until size_bytes may go. Who is cancelled while he waits takes nothing.

        A waiter can be overtaken by nobody, so take pieces that are small against a second's worth.
        """
        if not self.bytes_per_s:
            return
        async with self._turn:
            now_s = self._clock.monotonic_s()
            paid_s = max(self._paid_s, now_s - BURST_S) + size_bytes / self.bytes_per_s
            if paid_s > now_s:
                await self._clock.sleep(paid_s - now_s)
            self._paid_s = paid_s

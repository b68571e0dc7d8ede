"""How many requests are in hand, and whether more are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from stoker_core.errors import Overloaded, Stopping


class Intake:
    def __init__(self, streams_max: int) -> None:
        self._streams_max = streams_max
        self._idle = asyncio.Event()
        self._idle.set()
        self.open = 0
        self.stopping = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request in. Raises Stopping, Overloaded."""
        if self.stopping:
            raise Stopping("the gateway is stopping")
        if self.open >= self._streams_max:
            raise Overloaded("the gateway", retry_after_ms=1000)
        self.open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.open -= 1
            if not self.open:
                self._idle.set()

    def stop(self) -> None:
        self.stopping = True

    async def drained(self) -> None:
        """Returns once no request is in hand."""
        await self._idle.wait()

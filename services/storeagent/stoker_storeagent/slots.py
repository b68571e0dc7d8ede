"""So many things at once, and whose turn it is: starts before prefetches, however late they come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

RANK_START = (0, 0, 0.0)


@dataclass(eq=False)
class Turn:
    """What waits for a slot does so by its rank, lowest first, and may be given another one while it waits.

    (0 for a start and 1 for a prefetch, −priority, deadline in seconds of the clock).
    """

    rank: tuple[int, int, float] = RANK_START

    @property
    def starting(self) -> bool:
        return self.rank[0] == 0

    def hasten(self, rank: tuple[int, int, float]) -> None:
        self.rank = min(self.rank, rank)


class Slots:
    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[int, tuple[Turn, asyncio.Future[None]]] = {}
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def taken(self, turn: Turn) -> AsyncIterator[None]:
        await self._take(turn)
        try:
            yield
        finally:
            self._free += 1
            self._next()

    async def _take(self, turn: Turn) -> None:
        if self._free and not self._waiting:
            self._free -= 1
            return
        arrival = next(self._arrivals)
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[arrival] = (turn, given)
        self._next()
        try:
            await given
        except asyncio.CancelledError:
            if self._waiting.pop(arrival, None) is None and not given.cancelled():  # it had just been given to us
                self._free += 1
                self._next()
            raise

    def _next(self) -> None:
        while self._free and self._waiting:
            arrival = min(self._waiting, key=lambda number: (self._waiting[number][0].rank, number))
            _, given = self._waiting.pop(arrival)
            if not given.done():
                self._free -= 1
                given.set_result(None)

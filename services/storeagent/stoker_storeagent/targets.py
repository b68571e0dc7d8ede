"""Where a transfer's positions go: into a load in the pool, or through a few buffers onto the disk alone."""

from __future__ import annotations

import asyncio
import mmap

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.clock import Clock
from stoker_core.errors import StokerError
from stoker_storeagent.ports import Filling
from stoker_storeagent.records import Checkpoint

WINDOW_POLL_S = 0.005
"""A consumer of a window tells nobody when it releases; a chunk takes longer to fetch."""


class PoolTarget:
    """window: its chunks serve several positions one after the other."""

    def __init__(self, filling: Filling, clock: Clock, *, window: bool) -> None:
        self._filling, self._clock = filling, clock
        self.copy_first = window

    async def claim(self, position: int) -> memoryview:
        while not self._filling.window_open(position):
            await self._clock.sleep(WINDOW_POLL_S)
        return self._filling.buffer(position)

    def publish(self, position: int) -> None:
        self._filling.publish(position)

    def done(self, position: int) -> None:
        """Its chunk stays as long as the load does."""

    def fail(self, position: int) -> None:
        self._filling.fail(position)

    async def next_failed(self) -> tuple[int, StokerError] | None:
        return await self._filling.next_failed()


class DiskTarget:
    """Buffers outside of the pool: what is only to lie on the disk takes nobody's room in memory."""

    copy_first = True

    def __init__(self, checkpoint: Checkpoint, buffers: int) -> None:
        self._checkpoint = checkpoint
        self._free: asyncio.Queue[mmap.mmap] = asyncio.Queue()
        for _ in range(buffers):
            self._free.put_nowait(
                mmap.mmap(-1, CHUNK_BYTES)
            )  # page-aligned, as O_DIRECT wants it; no memory until used
        self._used: dict[int, mmap.mmap] = {}

    async def claim(self, position: int) -> memoryview:
        self._used[position] = await self._free.get()
        _, _, size_bytes = self._checkpoint.place(position)
        return memoryview(self._used[position])[:size_bytes]

    def publish(self, position: int) -> None:
        """Nobody waits for it in memory."""

    def done(self, position: int) -> None:
        self._free.put_nowait(self._used.pop(position))

    def fail(self, position: int) -> None:
        """Who runs the transfer hears of it."""

    async def next_failed(self) -> tuple[int, StokerError] | None:
        return None

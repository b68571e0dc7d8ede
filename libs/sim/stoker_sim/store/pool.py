"""A node's pool as hardware: a memfd with real geometry, of which little is ever touched, and the boards of its loads.

It outlives the agent that made it for as long as the worker keeps it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from contextlib import suppress
from enum import Enum

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import StokerError
from stoker_sim.store.contents import SHARD_BYTES_MAX
from stoker_sim.store.flaws import Flaws

_GARBAGE = b"\xa5" * SHARD_BYTES_MAX


class State(Enum):
    LOADING = "loading"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Board:
    """Of one load: its table, what is ready, how it ended. Shared with those who read from it."""

    def __init__(self, table: tuple[int, ...], window: int) -> None:
        self.table, self.window = table, window
        self.state = State.LOADING
        self.ready: set[int] = set()
        self.released = 0
        self.error: StokerError | None = None
        self._changed = asyncio.Event()

    @property
    def chunks(self) -> frozenset[int]:
        return frozenset(self.table)

    def change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    def finish(self, state: State, error: StokerError | None = None) -> None:
        if self.state is State.LOADING:
            self.state, self.error = state, error
            self.change()


class SimPool:
    """readers: chunk → instances that may still read it, and by which board."""

    def __init__(self, chunks: int, flaws: Flaws) -> None:
        self.chunks_total, self._flaws = chunks, flaws
        self.fd = os.memfd_create("sim-pool", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, chunks * CHUNK_BYTES)
        self._memory = mmap.mmap(self.fd, chunks * CHUNK_BYTES)
        self.boards: list[Board] = []
        self.readers: dict[int, dict[str, Board]] = {}

    def view(self, chunk: int, size: int) -> memoryview:
        begin = chunk * CHUNK_BYTES
        return memoryview(self._memory)[begin : begin + size]

    def hand_out(self, chunks: tuple[int, ...]) -> None:
        """Whoever gets them writes to them from now on; what was there is lost at once."""
        for chunk in chunks:
            for reader in self.readers.get(chunk, ()):
                self._flaws.add(f"chunk {chunk} was handed out while {reader} may read it")
            self.view(chunk, SHARD_BYTES_MAX)[:] = _GARBAGE

    def opened(self, reader: str, board: Board) -> None:
        for chunk in board.chunks:
            self.readers.setdefault(chunk, {})[reader] = board

    def left(self, reader: str, board: Board) -> None:
        for chunk in board.chunks:
            if self.readers.get(chunk, {}).get(reader) is board:
                del self.readers[chunk][reader]

    def close(self) -> None:
        os.close(self.fd)
        with suppress(BufferError):  # a view lives in the frame of somebody who was killed: the mapping goes with it
            self._memory.close()

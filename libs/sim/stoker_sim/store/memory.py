"""The pool as its agent has it: who allocated what, and loads that are filled."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoker_checkpoint.digests import chunk_digest
from stoker_core.errors import CorruptCheckpoint, LoadCancelled, ReadFailed, SourceUnavailable, StokerError
from stoker_sim.dice import Dice
from stoker_sim.loop import crash_point
from stoker_sim.store.disk import SimDisk
from stoker_sim.store.flaws import Flaws
from stoker_sim.store.pool import Board, SimPool, State
from stoker_storeagent.records import Checkpoint

READS_AT_ONCE = 3
READ_S = 0.002
WINDOW_POLL_S = 0.001
SILENT_S = 60.0


class SimMemory:
    """Implements ports.Memory, for one run of an agent. lost: chunks of loads that could not be closed."""

    def __init__(self, pool: SimPool, disk: SimDisk, dice: Dice, flaws: Flaws, used: Sequence[int] = ()) -> None:
        """used: of a pool that is taken over, allocated already."""
        self.pool, self.disk, self.dice, self.flaws = pool, disk, dice, flaws
        self.allocated: set[int] = set()
        self.lost: set[int] = set()
        self._take(tuple(used))

    @property
    def chunks_total(self) -> int:
        return self.pool.chunks_total

    def fill(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        files: Mapping[int, tuple[Path, str]],
        *,
        window_chunks: int = 0,
        chunks: Sequence[int] | None = None,
        priority: int = 0,
    ) -> SimFilling:
        crash_point("before fill")
        positions = checkpoint.positions
        window = window_chunks if 0 < window_chunks < positions else 0
        if chunks is None:
            used = self._allocate(window or positions)
            self.pool.hand_out(used)  # the reader begins at once
        else:
            used = tuple(chunks)
            self.flaws.require(self.allocated.issuperset(used), f"{used} were given to a load and are not allocated")
        board = Board(tuple(used[position % len(used)] for position in range(positions)), window)
        self.pool.boards.append(board)
        crash_point("fill")
        return SimFilling(self, checkpoint, files, board, used, number=len(self.pool.boards) - 1)

    def free(self, chunks: Sequence[int]) -> None:
        crash_point("free")
        self.flaws.require(self.allocated.issuperset(chunks), f"{tuple(chunks)} were freed and not all are allocated")
        self.allocated.difference_update(chunks)

    def _allocate(self, count: int) -> tuple[int, ...]:
        free = sorted(set(range(self.chunks_total)) - self.allocated)
        self.flaws.require(count <= len(free), f"{count} chunks were wanted where {len(free)} are free")
        chosen = [free.pop(self.dice.below(len(free))) for _ in range(min(count, len(free)))]
        self._take(tuple(chosen))
        return tuple(chosen)

    def _take(self, chunks: tuple[int, ...]) -> None:
        twice = len(set(chunks)) < len(chunks) or not self.allocated.isdisjoint(chunks)
        self.flaws.require(not twice, f"{chunks} were allocated twice")
        self.allocated.update(chunks)


class SimFilling:
    """Implements ports.Filling, as strictly as the native one does."""

    def __init__(
        self,
        memory: SimMemory,
        checkpoint: Checkpoint,
        files: Mapping[int, tuple[Path, str]],
        board: Board,
        chunks: tuple[int, ...],
        *,
        number: int,
    ) -> None:
        self._memory, self._checkpoint, self.board = memory, checkpoint, board
        self._files, self._chunks, self._number = dict(files), chunks, number
        self._owned = set(range(checkpoint.positions)) - self._files.keys()
        self._unsettled = set(self._files)
        self._failed: deque[tuple[int, StokerError]] = deque()
        self._in_flight = 0
        self._closing: asyncio.Task[None] | None = None
        self._reader = asyncio.ensure_future(self._read_all()) if files else None

    @property
    def pool_fd(self) -> int:
        return self._memory.pool.fd

    @property
    def board_fd(self) -> int:
        """Of the pool's boards the index: whoever is given it finds the board there."""
        return self._number

    @property
    def chunks(self) -> tuple[int, ...]:
        return self._chunks

    def buffer(self, position: int) -> memoryview:
        return self._memory.pool.view(self.board.table[position], self._checkpoint.place(position)[2])

    def window_open(self, position: int) -> bool:
        window, before = self.board.window, position - self.board.window
        return not window or before < 0 or (before < self.board.released and before in self.board.ready)

    def is_ready(self, position: int) -> bool:
        return position in self.board.ready

    async def ready(self, position: int) -> bool:
        while position not in self.board.ready:
            if self.board.state is not State.LOADING:
                return False
            await self.board.changed()
        return True

    async def next_failed(self) -> tuple[int, StokerError] | None:
        while True:
            if self._failed:
                return self._failed.popleft()
            if not self._unsettled or self.board.state is not State.LOADING:
                return None
            await self.board.changed()

    def publish(self, position: int) -> None:
        crash_point("publish")
        if position not in self._owned or position in self.board.ready or not self.window_open(position):
            raise ValueError(f"position {position} is not the owner's to publish")
        self._publish(position)

    def release(self, position: int) -> None:
        self.board.released = max(self.board.released, position)
        self.board.change()

    def fail(self, position: int) -> None:
        shard, offset, _ = self._checkpoint.place(position)
        reason = f"the bytes from {offset} on cannot be had from anywhere"
        self.board.finish(State.FAILED, SourceUnavailable(shard, reason))

    def cancel(self) -> None:
        self.board.finish(State.CANCELLED)

    async def wait(self) -> None:
        while self.board.state is State.LOADING:
            await self.board.changed()
        if self.board.state is not State.DONE:
            raise self.board.error or LoadCancelled()

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        memory = self._memory
        self.cancel()
        if self._files and memory.dice.chance(memory.disk.faults.disk_silent):
            await asyncio.sleep(SILENT_S)
            memory.lost.update(self._chunks)
            raise ReadFailed("the disk", 0, 110)
        await memory.disk.pause(READ_S)
        while self._in_flight:
            await self.board.changed()
        chunks, self._chunks = self._chunks, ()
        memory.free(chunks)

    async def _read_all(self) -> None:
        for position in sorted(self._files):
            while not self.window_open(position) or self._in_flight >= READS_AT_ONCE:
                await asyncio.sleep(WINDOW_POLL_S)
                if self.board.state is not State.LOADING:
                    return
            if self.board.state is not State.LOADING:
                return
            self._in_flight += 1
            asyncio.ensure_future(self._read(position))  # noqa: RUF006 - `_in_flight` counts it

    async def _read(self, position: int) -> None:
        """As the kernel does: what it has begun it ends, though nobody may want it any more."""
        path, digest = self._files[position]
        place, memory = self.buffer(position), self._memory
        half = len(place) // 2
        try:
            await memory.disk.pause(READ_S)
            data = memory.disk.read_chunk(path)
            if len(data) != len(place):
                raise CorruptCheckpoint(str(path), "it has another size")
            place[:half] = data[:half]
            await memory.disk.pause(READ_S)
            place[half:] = data[half:]
            if chunk_digest(place) != digest:
                raise CorruptCheckpoint(str(path), "it has another digest")
        except (ReadFailed, CorruptCheckpoint) as error:
            if self.board.state is State.LOADING:
                self._owned.add(position)
                self._unsettled.discard(position)
                self._failed.append((position, error))
        else:
            self._unsettled.discard(position)
            self._publish(position)
        finally:
            self._in_flight -= 1
            self.board.change()

    def _publish(self, position: int) -> None:
        board = self.board
        if board.state is State.LOADING:
            board.ready.add(position)
            if len(board.ready) == len(board.table):
                board.finish(State.DONE)
            board.change()

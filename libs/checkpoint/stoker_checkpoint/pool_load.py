"""A load on the side that brings its bytes: from start to the moment when its chunks go back to the pool."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stoker_checkpoint import _native
from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.manifest import Shard
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    LoadCancelled,
    ReadFailed,
    SourceUnavailable,
    StokerError,
)

if TYPE_CHECKING:
    from stoker_checkpoint.pool import Pool

VERIFY_THREADS = 2
"""One digests 35 GiB/s; the other goes on where the first waits for the interpreter."""
CLOSE_S = 60.0
"""How long a read that the kernel has begun may take to end before closing gives up."""
_POLL_S = 0.1


def load_error(board: _native.Board, plan: ReadPlan, directory: Path) -> StokerError:
    """Why the load of `plan` ended without being done."""
    if board.state != _native.FAILED:
        return LoadCancelled()
    kind, file, offset, error = board.failure()
    return failure_error(
        kind, str(directory / plan.shards[file]) if file < len(plan.shards) else str(directory), offset, error
    )


def failure_error(kind: int, path: str, offset: int, error: int) -> StokerError:
    """kind: of `_native`.  error: an errno, of READ_ERROR."""
    if kind == _native.READ_ERROR:
        return ReadFailed(path, offset, error)
    if kind == _native.TRUNCATED:
        return CorruptCheckpoint(path, f"it ends at byte {offset}, before its registered size")
    if kind == _native.CHANGED:
        return CheckpointChanged(path, "its size or time of change is not what was registered")
    if kind == _native.SOURCE:
        return SourceUnavailable(path, f"the bytes from {offset} on cannot be had from anywhere")
    return CorruptCheckpoint(path, f"the chunk at byte {offset} does not have the digest that was registered")


class PoolLoad:
    """Its chunks stay allocated, whether the load succeeds or not, until it is closed.

    Consumers get `pool_fd` and `board_fd`; both stay this side's. Methods may be called from any thread, the
    coroutines from one event loop.
    """

    def __init__(
        self,
        pool: Pool,
        load: _native.Load,
        chunks: Sequence[int],
        plan: ReadPlan,
        shards: Sequence[Shard],
        directory: Path,
    ) -> None:
        """shards: the plan's.  directory: where they lie or would lie; for messages."""
        self._pool, self._load, self._plan, self._shards, self._directory = pool, load, plan, shards, directory
        self._board = load.board
        self._table = self._board.table
        self._chunks = tuple(chunks)
        self._closing = threading.Lock()
        self._waiters: set[asyncio.Future[None]] = set()
        self._verifiers: list[threading.Thread] = []

    @property
    def pool_fd(self) -> int:
        return self._pool.reader_fd

    @property
    def board_fd(self) -> int:
        return self._board.fileno()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of the pool; none any more once closed."""
        return self._chunks

    @property
    def direct(self) -> bool:
        """Whether every file so far was read past the page cache."""
        return self._load.direct

    @property
    def done(self) -> bool:
        """Whether every position is ready."""
        return self._board.state == _native.DONE

    async def wait(self) -> None:
        """Until it is done. A load through a window also waits for its consumer.

        Raises ReadFailed, CheckpointChanged, CorruptCheckpoint, SourceUnavailable or LoadCancelled, as it ended.
        """
        while self._board.state == _native.LOADING:
            await self._changed()
        self._check()

    def wait_blocking(self, timeout_s: float) -> bool:
        """As `wait`. False: it is still loading after that time."""
        if not self._joined(timeout_s):
            return False
        self._check()
        return True

    def cancel(self) -> None:
        """Begin no further read. No-op once the load has ended."""
        self._load.cancel()

    def close(self) -> None:
        """Cancel it if it is loading, wait for reads in flight, and give the chunks back. Idempotent.

        Consumers must have let go of them. Raises ReadFailed if the disk does not answer within CLOSE_S; the chunks,
        which it may still write to, then stay allocated until the next attempt.
        """
        self._load.cancel()
        with self._closing:
            if not self._joined(CLOSE_S):
                raise ReadFailed(str(self._directory), 0, errno.ETIMEDOUT)
            for thread in self._verifiers:
                thread.join()
            chunks, self._chunks = self._chunks, ()
            self._pool.free(self, chunks)

    async def aclose(self) -> None:
        """`close` in a thread. A caller who is cancelled does not stop it."""
        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self.close)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def verify(self) -> None:
        """Check what is read of files (in a load that holds) against the shards' digests, in threads of its own.

        Raises RuntimeError if there can be none; then it has to be closed.
        """
        for number in range(VERIFY_THREADS):
            thread = threading.Thread(
                target=verify_chunks,
                args=(self._load, self._plan, self._shards, self._pool.chunk, self._mismatch),
                name=f"verify-{number}",
                daemon=True,  # of a load that nobody closes: it must not keep the process alive
            )
            thread.start()
            self._verifiers.append(thread)

    @staticmethod
    def _mismatch(load: _native.Load, position: int, file: int, offset: int) -> None:
        """A position has another digest than its shard, of that index, says for the chunk at `offset`."""
        raise NotImplementedError

    async def _changed(self) -> None:
        """Until something has changed since the caller last looked, if it has not awaited anything since."""
        loop, fd = asyncio.get_running_loop(), self._load.fileno()
        if not self._waiters:
            loop.add_reader(fd, self._wake)
        waiter = loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if not self._waiters:
                loop.remove_reader(fd)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._load.fileno())
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _joined(self, timeout_s: float) -> bool:
        # In slices: a signal handler must not wait for a disk.
        deadline_s = time.monotonic() + timeout_s
        while not self._load.join(max(0.0, min(_POLL_S, deadline_s - time.monotonic()))):
            if time.monotonic() >= deadline_s:
                return False
        return True

    def _check(self) -> None:
        if not self.done:
            raise load_error(self._board, self._plan, self._directory)


def place_of(plan: ReadPlan, shards: Sequence[Shard], position: int) -> tuple[int, int, int]:
    """(index of the shard, offset in it, bytes) of a position of whole chunks."""
    file, chunk = plan.positions[position]
    offset = chunk * CHUNK_BYTES
    return file, offset, min(CHUNK_BYTES, shards[file].size_bytes - offset)


def verify_chunks(
    load: _native.Load,
    plan: ReadPlan,
    shards: Sequence[Shard],
    chunk_of: Callable[[int], memoryview],
    mismatch: Callable[[_native.Load, int, int, int], None],
) -> None:
    """Publish every position that was read and has the right digest; the others are `mismatch`'s.

    Returns when the load has ended, or none is left to be read.
    """
    table = load.board.table
    try:
        while load.unsettled:
            position = load.next_read(_POLL_S)
            if position is None:
                continue
            file, offset, size = place_of(plan, shards, position)
            if chunk_digest(chunk_of(table[position])[:size]) == shards[file].digests[offset // CHUNK_BYTES]:
                load.publish(position)
            else:
                mismatch(load, position, file, offset)
    except BaseException:
        load.cancel()  # nobody else would end it
        raise

"""What may wait for a disk while files are written, in native threads, for one event loop.

A thread of Python has to have the interpreter's lock before and after each call of the kernel, and while it is woken for
that the event loop may have to wait for it.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from stoker_checkpoint import _native


class Writer:
    """At most `threads` calls at once; others wait for their turn. Belongs to the event loop that uses it first.

    Every call raises OSError as the kernel refuses it. One that is cancelled returns once it is over.
    """

    def __init__(self, threads: int) -> None:
        """Raises ValueError for a number of threads that is not within 1 to 64."""
        self._native = _native.Writer(threads)
        self._free = asyncio.Semaphore(threads)
        self._waiting: dict[int, tuple[asyncio.Future[int], memoryview | None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A descriptor, closed at an exec."""
        async with self._free:
            opened = self._begin(self._native.open(path, flags, mode))
            try:
                return await _over(opened)
            except asyncio.CancelledError:
                if (descriptor := opened.result()) >= 0:
                    os.close(descriptor)
                raise

    async def write(self, fd: int, data: memoryview, offset: int) -> int:
        """One pwrite of data, which is contiguous and not empty; returns the bytes written, which may be fewer.

        `fd` must stay open, and `data` as it is, until it returns.
        """
        async with self._free:
            return await _over(self._begin(self._native.write(fd, data, offset), data))

    async def sync(self, fd: int) -> None:
        """One fdatasync."""
        async with self._free:
            await _over(self._begin(self._native.sync(fd)))

    async def rename(self, source: Path, target: Path) -> None:
        async with self._free:
            await _over(self._begin(self._native.rename(source, target)))

    def close(self) -> None:
        """Wait for what the threads do; blocks. After the last call. Idempotent."""
        self._native.close()
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._forget, loop)  # since it blocks it is called from a thread

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._native.fileno())

    def _begin(self, ticket: int, held: memoryview | None = None) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            loop.add_reader(self._native.fileno(), self._take)
        result: asyncio.Future[int] = loop.create_future()
        self._waiting[ticket] = (result, held)
        return result

    def _take(self) -> None:
        for ticket, value in self._native.take_done():
            result, _ = self._waiting.pop(ticket)
            result.set_result(value)


async def _over(result: asyncio.Future[int]) -> int:
    """What a call returned, not before it did. Raises OSError."""
    cancelled: asyncio.CancelledError | None = None
    while not result.done():
        try:
            await asyncio.shield(result)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    if (value := result.result()) < 0:
        raise OSError(-value, os.strerror(-value))
    return value

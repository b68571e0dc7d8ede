"""A chunk on its way to the disk: a file that only grows, and gets its name in the tier when it is complete."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from functools import partial
from pathlib import Path

from stoker_checkpoint.plan import ALIGN_BYTES, CHUNK_BYTES
from stoker_checkpoint.writing import Writer
from stoker_core.logging import get_logger
from stoker_storeagent.adapters.ssd_files import Layout, disk_errors
from stoker_storeagent.threads import Threads, to_its_end

log = get_logger("ssd")


class Direct:
    """Whether the file system takes writes past the page cache. Learnt from the first that it refuses."""

    def __init__(self) -> None:
        self.allowed = True

    def refused(self, path: Path) -> None:
        if self.allowed:
            log.info("direct_writes_refused", path=str(path))
        self.allowed = False


class SsdPart:
    """Implements `ports.Part`. One at a time for each file, and one call at a time.

    The file is written from its end on, never beyond, so at every moment, whoever dies, it is a prefix of the chunk.
    """

    def __init__(
        self, layout: Layout, threads: Threads, writer: Writer, direct: Direct, model_id: str, position: int
    ) -> None:
        self._path = layout.parts_of(model_id) / str(position)
        self._layout, self._threads, self._writer, self._direct = layout, threads, writer, direct
        self._fd = self._direct_fd = -1
        self._size = 0

    @property
    def size_bytes(self) -> int:
        return self._size

    async def open(self) -> None:
        """Look for what an earlier run left. Whatever happens, `close` is to follow. Raises TierFull, StorageFailed.

        A new file is made when it is first written to: nobody who brings a chunk waits for a disk that others write to.
        """
        with disk_errors(self._path):
            if _is_there(self._path):
                await self._open()

    async def read(self, into: memoryview) -> None:
        assert len(into) <= self._size, "nothing is read that is not there"
        await self._threads.run(partial(self._read, into))

    async def write(self, data: memoryview) -> None:
        assert self._size + len(data) <= CHUNK_BYTES, "a part is of one chunk"
        with disk_errors(self._path, len(data)):
            if self._fd < 0:
                await self._open()
            while data:
                try:
                    size = await self._write_some(data)
                except asyncio.CancelledError:
                    self._size = os.fstat(self._fd).st_size  # it wrote something all the same
                    raise
                if not size:
                    raise OSError(errno.EIO, "nothing was written")
                self._size += size
                data = data[size:]

    async def finish(self, digest: str) -> None:
        assert self._size, "a chunk has bytes"
        await to_its_end(self._finish(self._layout.chunk(digest)))
        self.close()

    async def discard(self) -> None:
        self.close()
        await self._threads.run(self._unlink)

    def close(self) -> None:
        descriptors = (self._fd, self._direct_fd)
        self._fd = self._direct_fd = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    async def _finish(self, chunk: Path) -> None:
        with disk_errors(self._path, self._size):
            try:
                await self._writer.sync(self._fd)
            except OSError:
                # The kernel says this once, and may have dropped the bytes: a second attempt would seem to succeed.
                await self._threads.run(self._unlink)
                raise
        await self._name(chunk)

    async def _open(self) -> None:
        self._fd = await self._opened()
        self._size = os.fstat(self._fd).st_size
        if self._direct.allowed:
            try:
                self._direct_fd = await self._writer.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
            except OSError as error:
                self._refused(error)

    async def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            return await self._writer.open(self._path, flags)
        except FileNotFoundError:  # the first part of a model
            await self._threads.run(partial(self._path.parent.mkdir, mode=0o700, exist_ok=True))
            return await self._writer.open(self._path, flags)

    def _read(self, into: memoryview) -> None:
        done = 0
        with disk_errors(self._path):
            while done < len(into):
                size = os.preadv(self._fd, [into[done:]], done)
                if not size:
                    raise OSError(errno.EIO, "the file has become shorter")
                done += size

    async def _write_some(self, data: memoryview) -> int:
        # The tail of a chunk is no multiple of what O_DIRECT takes: it goes through the page cache. So does what
        # follows on a short write.
        whole = len(data) - len(data) % ALIGN_BYTES
        direct = self._direct_fd >= 0 and self._direct.allowed and self._size % ALIGN_BYTES == 0
        if whole and direct and _is_aligned(data):
            try:
                return await self._writer.write(self._direct_fd, data[:whole], self._size)
            except OSError as error:
                self._refused(error)
        return await self._writer.write(self._fd, data, self._size)

    def _refused(self, error: OSError) -> None:
        """Raises it unless it says that there are no direct writes here."""
        if error.errno != errno.EINVAL:
            raise error
        self._direct.refused(self._path)

    async def _name(self, chunk: Path) -> None:
        # The name is not synced: if a power loss takes it, the chunk is fetched again. Its bytes were there before it.
        with disk_errors(self._path, self._size):
            try:
                await self._writer.rename(self._path, chunk)
            except FileNotFoundError:  # the first chunk of its folder
                await self._threads.run(partial(chunk.parent.mkdir, mode=0o700, exist_ok=True))
                await self._writer.rename(self._path, chunk)

    def _unlink(self) -> None:
        with disk_errors(self._path):
            self._path.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    """Looked up in memory, or in one block of a directory: not worth a thread."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _is_aligned(data: memoryview) -> bool:
    """Whether it lies in memory as O_DIRECT wants it. Of memory that is read-only we cannot tell."""
    return not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % ALIGN_BYTES == 0

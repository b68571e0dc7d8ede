"""A chunk on its way to the disk: a file that only grows, and gets its name in the tier when it is complete."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from functools import partial
from pathlib import Path

from stoker_checkpoint.plan import ALIGN_BYTES, CHUNK_BYTES
from stoker_core.logging import get_logger
from stoker_storeagent.adapters.ssd_files import Layout, disk_errors
from stoker_storeagent.threads import Threads

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

    def __init__(self, layout: Layout, threads: Threads, direct: Direct, model_id: str, position: int) -> None:
        self._path = layout.parts_of(model_id) / str(position)
        self._layout, self._threads, self._direct = layout, threads, direct
        self._fd = self._direct_fd = -1
        self._size = 0

    @property
    def size_bytes(self) -> int:
        return self._size

    async def open(self) -> None:
        """Whatever happens, `close` is to follow. Raises TierFull, StorageFailed."""
        await self._threads.run(self._open)

    async def read(self, into: memoryview) -> None:
        assert len(into) <= self._size, "nothing is read that is not there"
        await self._threads.run(partial(self._read, into))

    async def write(self, data: memoryview) -> None:
        assert self._size + len(data) <= CHUNK_BYTES, "a part is of one chunk"
        await self._threads.run(partial(self._write, data))

    async def finish(self, digest: str) -> None:
        assert self._size, "a chunk has bytes"
        chunk = self._layout.chunk(digest)
        await self._threads.run(partial(self._finish, chunk))
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

    def _open(self) -> None:
        with disk_errors(self._path):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._size = os.fstat(self._fd).st_size

    def _read(self, into: memoryview) -> None:
        done = 0
        with disk_errors(self._path):
            while done < len(into):
                size = os.preadv(self._fd, [into[done:]], done)
                if not size:
                    raise OSError(errno.EIO, "the file has become shorter")
                done += size

    def _write(self, data: memoryview) -> None:
        with disk_errors(self._path, len(data)):
            while data:
                size = self._write_some(data)
                if not size:
                    raise OSError(errno.EIO, "nothing was written")
                self._size += size
                data = data[size:]

    def _write_some(self, data: memoryview) -> int:
        # The tail of a chunk is no multiple of what O_DIRECT takes: it goes through the page cache. So does what
        # follows on a short write.
        whole = len(data) - len(data) % ALIGN_BYTES
        if whole and self._direct.allowed and self._size % ALIGN_BYTES == 0 and _is_aligned(data):
            try:
                if self._direct_fd < 0:
                    self._direct_fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
                return os.pwrite(self._direct_fd, data[:whole], self._size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct.refused(self._path)
        return os.pwrite(self._fd, data, self._size)

    def _finish(self, chunk: Path) -> None:
        with disk_errors(self._path, self._size):
            try:
                os.fdatasync(self._fd)
            except OSError:
                # The kernel says this once, and may have dropped the bytes: a second attempt would seem to succeed.
                self._path.unlink(missing_ok=True)
                raise
            if _has_size(chunk, self._size):
                self._path.unlink()
                return
            chunk.parent.mkdir(mode=0o700, exist_ok=True)
            # The name is not synced: if a power loss takes it, the chunk is fetched again. Its bytes were there before it.
            self._path.rename(chunk)

    def _unlink(self) -> None:
        with disk_errors(self._path):
            self._path.unlink(missing_ok=True)


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size_bytes


def _is_aligned(data: memoryview) -> bool:
    """Whether it lies in memory as O_DIRECT wants it. Of memory that is read-only we cannot tell."""
    return not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % ALIGN_BYTES == 0

"""Writes to files from native threads, awaited."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from stoker_checkpoint.writing import Writer

PIECE_BYTES = 100_000


async def test_what_was_written_at_once_lies_where_it_belongs(tmp_path: Path) -> None:
    content = os.urandom(50 * PIECE_BYTES)
    writer = Writer(3)
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)

    async def piece(at: int) -> int:
        return await writer.write(fd, memoryview(content)[at : at + PIECE_BYTES], at)

    sizes = await asyncio.gather(*(piece(at) for at in range(0, len(content), PIECE_BYTES)))
    await writer.sync(fd)
    writer.close()
    os.close(fd)
    assert sum(sizes) == len(content)
    assert (tmp_path / "file").read_bytes() == content


async def test_what_the_kernel_refuses_is_an_oserror_of_that_call_alone(tmp_path: Path) -> None:
    writer = Writer(1)
    reading = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        await writer.write(reading, memoryview(b"x"), 0)
    os.close(reading)
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    assert await writer.write(fd, memoryview(b"abc"), 0) == 3
    writer.close()
    os.close(fd)


async def test_a_cancelled_call_is_over_before_its_caller_goes_on(tmp_path: Path) -> None:
    """So that neither the bytes nor the descriptor change under it."""
    writer, data = Writer(1), bytearray(64 * 2**20)
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    writing = asyncio.create_task(writer.write(fd, memoryview(data), 0))
    await asyncio.sleep(0)  # it has begun
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert os.fstat(fd).st_size == len(data)
    assert await writer.write(fd, memoryview(b"x"), 0) == 1, "and the next has its turn"
    writer.close()
    os.close(fd)


async def test_a_closed_writer_takes_nothing(tmp_path: Path) -> None:
    writer = Writer(1)
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        await writer.sync(0)
    with pytest.raises(ValueError, match="threads"):
        Writer(0)

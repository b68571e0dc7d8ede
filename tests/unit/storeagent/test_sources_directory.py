"""Models in directories: what is read, what is refused, and that a cancelled read is over when it says so."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import pattern
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint.directory import inspect_directory
from stoker_core.errors import CheckpointChanged, RefusedCheckpoint, SourceUnavailable, StokerError
from stoker_storeagent.sources import directory
from stoker_storeagent.sources.directory import DirectorySource

SIZE = 100_000
SHARD = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a file that is read; for reading it need be no model."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / SHARD).write_bytes(pattern(SIZE, 0))
    return tmp_path / "m"


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    return DirectorySource([tmp_path])


async def read(
    source: DirectorySource, url: str, size: int, offset: int = 0, *, shard: str = SHARD, version: str = ""
) -> tuple[bytes, list[int]]:
    into, done = bytearray(size), list[int]()
    await source.read(url, shard, version, offset, memoryview(into), done.append)
    return bytes(into), done


async def test_a_directory_is_inspected_as_a_source(source: DirectorySource, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", shards=2)
    (tmp_path / "link").symlink_to(model)
    found, expected = await source.inspect(str(tmp_path / "link")), inspect_directory(model)
    assert found.source == model.as_uri()
    assert (found.config, found.small_files) == (expected.config, expected.small_files)
    assert [shard.tensors for shard in found.manifest.shards] == [shard.tensors for shard in expected.manifest.shards]
    assert {shard.mtime_ns for shard in found.manifest.shards} == {-1}  # a copy of it is the same model
    assert found.versions == {shard.name: str(shard.size_bytes) for shard in expected.manifest.shards}


async def test_bytes_are_read_from_anywhere_and_progress_is_told(
    source: DirectorySource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "PIECE_BYTES", 30_000)
    content, done = await read(source, folder.as_uri(), SIZE, version=str(SIZE))
    assert content == pattern(SIZE, 0)
    assert done == [30_000, 60_000, 90_000, SIZE]
    assert (await read(source, str(folder), 10, SIZE - 10))[0] == pattern(SIZE, 0)[-10:]


def grow(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"x")


@pytest.mark.parametrize("change", [grow, lambda file: os.truncate(file, SIZE - 1)])
async def test_a_file_of_another_size_than_registered_has_changed(
    source: DirectorySource, folder: Path, change: Any
) -> None:
    change(folder / SHARD)
    with pytest.raises(CheckpointChanged, match=f"not the {SIZE} that were registered"):
        await read(source, folder.as_uri(), 10, version=str(SIZE))


async def test_a_file_that_ends_too_early_has_changed(source: DirectorySource, folder: Path) -> None:
    with pytest.raises(CheckpointChanged, match=f"ends at byte {SIZE}"):
        await read(source, folder.as_uri(), 20, SIZE - 10)


def spoil_missing(folder: Path) -> None:
    (folder / SHARD).unlink()


def spoil_link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


def spoil_pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def spoil_folder(folder: Path) -> None:
    folder.rename(folder.parent / "away")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_missing, "No such file"),
        (spoil_link, "leaves the model's directory"),
        (spoil_pipe, "no regular file"),
        (spoil_folder, "No such file"),
    ],
)
async def test_a_shard_that_cannot_be_had_is_refused(
    source: DirectorySource, folder: Path, spoil: Any, reason: str
) -> None:
    spoil(folder)
    with pytest.raises(RefusedCheckpoint, match=reason):
        await read(source, folder.as_uri(), 10)


@pytest.mark.parametrize("shard", ["../m/model.safetensors", "/etc/passwd", "..", ""])
async def test_a_shard_whose_name_leads_elsewhere_is_refused(source: DirectorySource, folder: Path, shard: str) -> None:
    with pytest.raises(RefusedCheckpoint, match="no plain file name"):
        await read(source, folder.as_uri(), 10, shard=shard)


async def test_what_lies_outside_of_the_allowed_roots_is_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(folder)
    source = DirectorySource([tmp_path / "allowed"])
    for url in (folder.as_uri(), str(tmp_path / "allowed" / "link")):
        with pytest.raises(RefusedCheckpoint, match="STOKER_STOREAGENT_ALLOWED_ROOTS"):
            await read(source, url, 10)


async def test_a_disk_that_fails_is_unavailable_and_may_be_asked_again(
    source: DirectorySource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(SourceUnavailable, match="reading at byte 7: Input/output error") as failed:
            await read(source, folder.as_uri(), 10, 7)
    assert failed.value.retryable
    await read(source, folder.as_uri(), 10, 7)


async def test_short_reads_are_gone_on_with(
    source: DirectorySource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:777]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert (await read(source, folder.as_uri(), 10_000, 5))[0] == pattern(SIZE, 0)[5:10_005]


async def test_a_cancelled_read_is_over_when_it_returns(
    source: DirectorySource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "PIECE_BYTES", 1)
    inside, go_on, calls, real = threading.Event(), threading.Event(), list[int](), os.preadv

    def slow(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        inside.set()
        go_on.wait(10)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    task = asyncio.create_task(read(source, folder.as_uri(), SIZE))
    await asyncio.to_thread(inside.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()  # the thread still writes to the memory
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == [0]


async def test_descriptors_are_closed_whatever_happens(source: DirectorySource, folder: Path) -> None:
    await read(source, folder.as_uri(), 10)
    before = len(os.listdir("/proc/self/fd"))
    for offset, version in ((0, ""), (SIZE, ""), (0, "1")):
        with contextlib.suppress(StokerError):
            await read(source, folder.as_uri(), 10, offset, version=version)
    assert len(os.listdir("/proc/self/fd")) == before

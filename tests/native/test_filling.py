"""Loads that are filled from chunk files and by their owner: right bytes, whatever the files hold and whoever is first."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest
from tests.native.conftest import POOL_CHUNKS
from tests.support.checkpoints import assert_same, plain_checkpoint

from stoker_checkpoint import _native
from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.filling import Filling
from stoker_checkpoint.load import attach
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    InvalidRequest,
    LoadCancelled,
    PoolExhausted,
    ReadFailed,
    SourceUnavailable,
    StokerError,
)

BOUND_S = 30.0


class Chunked:
    """A checkpoint of two shards, two chunks each, and every chunk as a file of its own."""

    def __init__(self, source: Path, directory: Path) -> None:
        self.source = source
        self.manifest: Manifest = digest_manifest(open_checkpoint(source), source)
        self.plan: ReadPlan = plan_reads(self.manifest)
        self.files = {position: directory / str(position) for position in range(len(self.plan.positions))}
        for position, path in self.files.items():
            path.write_bytes(self.content(position))

    def content(self, position: int) -> bytes:
        shard, chunk = self.plan.positions[position]
        data = (self.source / self.plan.shards[shard]).read_bytes()
        return data[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]

    def fill(self, pool: Pool, of_files: Iterable[int], *, window: int = 0, chunks: list[int] | None = None) -> Filling:
        files = {position: self.files[position] for position in of_files}
        return pool.fill(self.plan, self.manifest, files, directory=self.source, window_chunks=window, chunks=chunks)

    def bring(self, filling: Filling, position: int) -> None:
        buffer = filling.buffer(position)
        content = self.content(position)
        assert len(buffer) == len(content)
        buffer[:] = content
        filling.publish(position)

    def assert_right(self, filling: Filling) -> None:
        fds = filling.pool_fd, filling.board_fd
        with attach(self.manifest, self.plan, *fds, directory=self.source) as loaded:
            assert_same(dict(loaded.tensors()), read_reference(self.manifest, self.source))


@pytest.fixture
def chunked(two_shards: Path, tmp_path: Path) -> Chunked:
    return Chunked(two_shards, tmp_path)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    plain_checkpoint(directory, shards=2)
    return directory


async def failures(filling: Filling) -> dict[int, StokerError]:
    """All of them, by position."""
    found: dict[int, StokerError] = {}
    async with asyncio.timeout(BOUND_S):
        while failed := await filling.next_failed():
            assert failed[0] not in found
            found[failed[0]] = failed[1]
    return found


@pytest.mark.parametrize("of_files", [(), (0,), (1, 2), (0, 1, 2, 3)])
async def test_files_and_owner_together_bring_the_whole_checkpoint(
    pool: Pool, chunked: Chunked, of_files: tuple[int, ...]
) -> None:
    async with chunked.fill(pool, of_files) as filling:
        assert len(filling.chunks) == 4
        for position in reversed(range(4)):
            if position not in of_files:
                chunked.bring(filling, position)
        assert await failures(filling) == {}
        async with asyncio.timeout(BOUND_S):
            await filling.wait()
        assert filling.done
        chunked.assert_right(filling)


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


FAULTS: dict[str, tuple[Callable[[Path], None], type[StokerError], str]] = {
    "missing": (remove, ReadFailed, "No such file"),
    "too short": (cut, CorruptCheckpoint, "ends at byte"),
    "too long": (grow, CheckpointChanged, "size or time"),
    "wrong": (flip, CorruptCheckpoint, "chunk at byte 0 does not have the digest"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("position", [0, 3])
async def test_what_a_file_cannot_give_becomes_the_owners_and_the_rest_goes_on(
    pool: Pool, chunked: Chunked, fault: str, position: int
) -> None:
    spoil, kind, message = FAULTS[fault]
    spoil(chunked.files[position])
    async with chunked.fill(pool, range(4)) as filling:
        with pytest.raises(ValueError, match="not the owner's"):
            filling.publish(position)
        found = await failures(filling)
        assert [(at, type(error)) for at, error in found.items()] == [(position, kind)]
        assert message in str(found[position])
        assert getattr(found[position], "path", None) == str(chunked.files[position])
        assert [filling.is_ready(at) for at in range(4)] == [at != position for at in range(4)]
        chunked.bring(filling, position)
        async with asyncio.timeout(BOUND_S):
            await filling.wait()
        chunked.assert_right(filling)


async def test_a_load_all_of_whose_files_are_lost_is_its_owners(pool: Pool, chunked: Chunked, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    async with chunked.fill(pool, range(4)) as filling:
        found = await failures(filling)
        assert sorted(found) == [0, 1, 2, 3]
        for position in found:
            chunked.bring(filling, position)
        await filling.wait()
        chunked.assert_right(filling)


async def test_everyone_hears_of_what_they_wait_for(pool: Pool, chunked: Chunked) -> None:
    async with chunked.fill(pool, [1]) as filling, asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
        waiting = [group.create_task(filling.ready(position)) for position in (0, 1, 2, 3, 3)]
        done = group.create_task(filling.wait())
        assert await filling.ready(1)
        assert not filling.is_ready(2)
        for position in (3, 2, 0):
            chunked.bring(filling, position)
            assert await filling.ready(position)
        await done
        assert [await task for task in waiting] == [True] * 5
    assert not asyncio.get_running_loop().remove_reader(filling._load.fileno())


@pytest.mark.parametrize("window", [1, 2, 3])
async def test_a_window_streams_what_files_and_owner_bring(pool: Pool, chunked: Chunked, window: int) -> None:
    flip(chunked.files[2])
    async with chunked.fill(pool, [0, 2], window=window) as filling:
        assert len(filling.chunks) == window
        assert [filling.window_open(position) for position in range(4)] == [at < window for at in range(4)]
        wanted = {1, 3}

        async def owner() -> None:
            failed = asyncio.create_task(filling.next_failed())
            for position in range(4):
                if position == 2:
                    found = await failed
                    assert found is not None
                    assert found[0] == 2
                    wanted.add(2)
                if position in wanted:
                    while not filling.window_open(position):
                        await asyncio.sleep(0.001)
                    chunked.bring(filling, position)
            assert await filling.next_failed() is None

        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
            group.create_task(owner())
            for position in range(4):
                assert await filling.ready(position)
                assert filling.buffer(position) == chunked.content(position)
                filling.release(position + 1)
            await filling.wait()


async def test_what_cannot_be_had_from_anywhere_ends_the_load_for_all(pool: Pool, chunked: Chunked) -> None:
    async with chunked.fill(pool, [0]) as filling:
        assert await failures(filling) == {}
        waiting = asyncio.create_task(filling.ready(2))
        await asyncio.sleep(0)
        filling.fail(3)
        async with asyncio.timeout(BOUND_S):
            assert not await waiting
            assert await filling.ready(0)
            with pytest.raises(SourceUnavailable, match=f"bytes from {CHUNK_BYTES} on") as caught:
                await filling.wait()
            assert await filling.next_failed() is None
        assert caught.value.source == str(chunked.source / chunked.plan.shards[1])
        filling.publish(1)
        assert not filling.is_ready(1)
        fds = filling.pool_fd, filling.board_fd
        with (
            attach(chunked.manifest, chunked.plan, *fds, directory=chunked.source) as loaded,
            pytest.raises(SourceUnavailable),
        ):
            loaded.wait(BOUND_S)


async def test_cancelling_ends_every_wait(pool: Pool, chunked: Chunked) -> None:
    filling = chunked.fill(pool, [])
    ready = asyncio.create_task(filling.ready(0))
    done = asyncio.create_task(filling.wait())
    await asyncio.sleep(0)
    filling.cancel()
    async with asyncio.timeout(BOUND_S):
        assert not await ready
        with pytest.raises(LoadCancelled):
            await done
    await filling.aclose()
    await filling.aclose()
    assert pool.native.chunks_free == POOL_CHUNKS


async def test_closing_at_any_moment_gives_all_chunks_back_and_ends_the_verifiers(pool: Pool, chunked: Chunked) -> None:
    remove(chunked.files[1])
    for number in range(12):
        filling = chunked.fill(pool, range(4), window=number % 4)
        if number % 4 == 0:
            async with asyncio.timeout(BOUND_S):
                await filling.next_failed()
        await filling.aclose()
        assert pool.native.chunks_free == POOL_CHUNKS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify")]


async def test_verifiers_end_when_no_file_is_left_though_the_load_goes_on(pool: Pool, chunked: Chunked) -> None:
    async with chunked.fill(pool, [0, 1]) as filling:
        assert await failures(filling) == {}
        for thread in filling._verifiers:
            thread.join(BOUND_S)
            assert not thread.is_alive()
        assert not filling.done


def test_what_cannot_be_filled_is_refused_and_takes_nothing(pool: Pool, chunked: Chunked, tmp_path: Path) -> None:
    plan, manifest = chunked.plan, chunked.manifest
    unknown = msgspec.structs.replace(
        manifest, shards=tuple(msgspec.structs.replace(shard, digests=()) for shard in manifest.shards)
    )
    with pytest.raises(InvalidRequest, match="digests are not known"):
        pool.fill(plan, unknown, chunked.files, directory=tmp_path)
    with pytest.raises(InvalidRequest, match="no position 4"):
        pool.fill(plan, manifest, {4: chunked.files[0]}, directory=tmp_path)
    with pytest.raises(InvalidRequest, match="whole chunks"):
        pool.fill(plan_reads(manifest, ["0.7"]), manifest, {}, directory=tmp_path)
    with pytest.raises(InvalidRequest, match="no shard"):
        pool.fill(plan, msgspec.structs.replace(manifest, shards=manifest.shards[1:]), {}, directory=tmp_path)
    for chunks in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, POOL_CHUNKS]):
        with pytest.raises(InvalidRequest):
            chunked.fill(pool, [], chunks=chunks)
    with pytest.raises(InvalidRequest):
        chunked.fill(pool, [], window=2, chunks=[0, 1, 2, 3])
    with chunked.fill(pool, []), chunked.fill(pool, []), pytest.raises(PoolExhausted):
        chunked.fill(pool, [])
    with pool.fill(plan, unknown, {}, directory=tmp_path) as filling:  # digests are for files
        chunked.bring(filling, 0)


# A pool whose first owner is gone.


async def test_chunks_that_are_there_already_are_taken_as_they_lie(pool: Pool, chunked: Chunked) -> None:
    allocated = pool.native.allocate(5)
    assert allocated is not None
    chunks = [allocated[place] for place in (4, 1, 3, 0)]
    for position, chunk in enumerate(chunks):
        content = chunked.content(position)
        pool.chunk(chunk)[: len(content)] = content
    async with chunked.fill(pool, [], chunks=chunks) as filling:
        assert filling.chunks == tuple(chunks)
        for position in range(4):
            filling.publish(position)
        await filling.wait()
        chunked.assert_right(filling)
    assert pool.native.chunks_free == POOL_CHUNKS - 1
    pool.native.free([allocated[2]])


OWNER = r"""
import array, json, socket, sys, time
from pathlib import Path
from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool

directory, fd = Path(sys.argv[1]), int(sys.argv[2])
manifest = open_checkpoint(directory)
pool = Pool(8 * CHUNK_BYTES, huge="none", lock=False)
reading = pool.read(plan_reads(manifest), manifest, directory)
assert reading.wait_blocking(30)
with socket.socket(fileno=fd) as keeper:
    socket.send_fds(keeper, [json.dumps(reading.chunks).encode()], [pool.native.fileno()])
    time.sleep(600)
"""


async def test_a_pool_outlives_the_killed_process_that_made_it_if_a_third_one_keeps_it(chunked: Chunked) -> None:
    keeper, given = socket.socketpair()
    with keeper, given:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(chunked.source), str(given.fileno())],
            pass_fds=[given.fileno()],
            cwd=Path(__file__).parents[2],
        )
        try:
            keeper.settimeout(BOUND_S)
            line, (fd,), _, _ = socket.recv_fds(keeper, 4096, 1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(BOUND_S)
    chunks = json.loads(line)
    with Pool.adopt(fd, chunks, lock=False) as pool:
        os.close(fd)
        assert pool.native.chunks_free == POOL_CHUNKS - 4
        async with chunked.fill(pool, [], chunks=chunks) as filling:
            for position in range(4):
                assert filling.buffer(position) == chunked.content(position)
                filling.publish(position)
            async with asyncio.timeout(BOUND_S):
                await filling.wait()
            chunked.assert_right(filling)
            async with chunked.fill(pool, range(4)) as other:  # the adopted pool is read into as well
                async with asyncio.timeout(BOUND_S):
                    await other.wait()
                chunked.assert_right(other)
        assert pool.native.chunks_free == POOL_CHUNKS


def test_a_kind_of_failure_that_does_not_exist_is_refused(pool: Pool, chunked: Chunked) -> None:
    with chunked.fill(pool, []) as filling:
        for kind in (0, 5, 7):
            with pytest.raises(ValueError, match="kind"):
                filling._load.fail(kind, 0, 0, 0)
        assert _native.SOURCE not in (_native.READ_ERROR, _native.MISMATCH, _native.DEVICE_ERROR)

"""The storage agent's pool: weights leased through real descriptors, against real files on a real disk."""

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tests.support.lease_client import LeaseClient, lease_client
from tests.support.services import eventually
from tests.support.storeagent_rig import POOL_CHUNKS, Agent, agent
from tests.support.tiny_model import write_safetensors, write_tiny_model

from stoker_checkpoint import _native, reading
from stoker_checkpoint.load import LoadedCheckpoint, attach
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted, LeaseRequest
from stoker_core.errors import CheckpointChanged, CorruptCheckpoint, LoadCancelled, StokerError

SHARD = "model.safetensors"


def write_model(directory: Path, chunks: int, seed: int = 0) -> Path:
    """A model whose weights take `chunks` of the pool, the last one in part."""
    write_tiny_model(directory, tokenizer=False)
    (directory / "tokenizer.json").write_text("{}")
    sizes = [CHUNK_BYTES - 4097] * (chunks - 1) + [CHUNK_BYTES // 3 + chunks * 4096]
    random = np.random.default_rng(seed)
    tensors = {f"t{i}": ("U8", (size,), random.bytes(size)) for i, size in enumerate(sizes)}
    write_safetensors(directory / SHARD, tensors)
    assert -(-(directory / SHARD).stat().st_size // CHUNK_BYTES) == chunks
    return directory


def attached(client: LeaseClient, granted: LeaseGranted) -> LoadedCheckpoint:
    manifest = open_checkpoint(Path(granted.path))
    pool_fd, board_fd = client.descriptors
    return attach(manifest, plan_reads(manifest), pool_fd, board_fd, directory=Path(granted.path))


async def read(client: LeaseClient, granted: LeaseGranted) -> dict[str, bytes]:
    """Every tensor's bytes, as a consumer gets them. In a thread: the agent lives in this process's loop."""

    def tensors() -> dict[str, bytes]:
        with attached(client, granted) as loaded:
            return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in loaded.tensors()}

    return await asyncio.to_thread(tensors)


def written(source: Path) -> dict[str, bytes]:
    manifest = open_checkpoint(source)
    files = {shard.name: (source / shard.name).read_bytes() for shard in manifest.shards}
    return {t.name: files[t.shard][t.offset_bytes : t.offset_bytes + t.size_bytes] for t in manifest.tensors}


@contextlib.asynccontextmanager
async def leased(store: Agent, model_id: str) -> AsyncIterator[tuple[LeaseClient, LeaseGranted]]:
    async with lease_client(store.socket) as client:
        yield client, await client.lease(model_id)


async def lease_once(store: Agent, model_id: str) -> Tier:
    """Lease, read everything, give it back, and wait until that is seen."""
    async with leased(store, model_id) as (client, granted):
        await read(client, granted)
    await eventually(lambda: not any(h.leases for h in store.held() + store.held(Tier.DRAM)), what="the lease's end")
    return granted.source


def dram(store: Agent) -> list[str]:
    return sorted(held.model_id for held in store.held(Tier.DRAM))


class Gate:
    """Holds up every reading that is verified, until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, digest = Gate(), reading.chunk_digest

    def held_up(data: memoryview) -> str:
        assert made.open.wait(30)
        return digest(data)

    monkeypatch.setattr(reading, "chunk_digest", held_up)
    yield made
    made.open.set()


async def test_a_lease_gives_exactly_the_bytes_of_the_files(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", tokenizer=False, shards=3)
    (source / "tokenizer.json").write_text("{}")
    large = write_model(tmp_path / "large", 3)
    async with agent(tmp_path) as store:
        for name, directory in (("tiny", source), ("large", large)):
            spec = await store.register(directory, name)
            async with leased(store, spec.model_id) as (client, granted):
                assert await read(client, granted) == written(directory)


async def test_who_comes_later_finds_the_model_in_memory(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 2)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        assert await lease_once(store, spec.model_id) is Tier.REMOTE
        assert await lease_once(store, spec.model_id) is Tier.DRAM
        async with leased(store, spec.model_id) as (client, granted):
            assert await read(client, granted) == written(source)
            await client.used(load_ms=10.0, read_bytes=10**6)
            await eventually(lambda: store.status(Tier.DRAM).read_bytes_per_s > 0, what="the bandwidth of memory")
        status = store.status(Tier.DRAM)
        assert (status.hits, status.misses) == (2, 1)
        assert (status.used_bytes, status.capacity_bytes) == (2 * CHUNK_BYTES, POOL_CHUNKS * CHUNK_BYTES)
        assert store.status(Tier.SSD).read_bytes_per_s > 0
        assert store.told("filling", Tier.DRAM) == store.told("filled", Tier.DRAM) == [spec.model_id]


async def test_after_a_restart_the_source_is_the_ssd(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
    async with agent(tmp_path, store.database) as store:
        assert await lease_once(store, spec.model_id) is Tier.SSD


async def test_leases_at_once_read_once(tmp_path: Path, gate: Gate) -> None:
    source = write_model(tmp_path / "m", 2)
    async with agent(tmp_path) as store, contextlib.AsyncExitStack() as stack:
        spec = await store.register(source)
        clients = [await stack.enter_async_context(lease_client(store.socket)) for _ in range(8)]
        granted = await asyncio.gather(*(client.lease(spec.model_id) for client in clients))
        gate.open.set()
        for client, grant in zip(clients, granted, strict=True):
            assert await read(client, grant) == written(source)
        await eventually(lambda: [held.leases for held in store.held(Tier.DRAM)] == [8])
        assert store.status(Tier.DRAM).used_bytes == 2 * CHUNK_BYTES
        assert store.told("filling", Tier.DRAM) == [spec.model_id]


async def test_a_lease_is_granted_while_its_model_is_still_read_and_says_so(tmp_path: Path, gate: Gate) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 1))
        async with leased(store, spec.model_id) as (client, granted):
            assert store.held(Tier.DRAM) == []
            async with leased(store, spec.model_id) as (_, second):
                assert second.source is Tier.DRAM
            gate.open.set()
            assert await read(client, granted)


async def test_without_weights_no_descriptors_come_and_nothing_is_read(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 1))
        async with lease_client(store.socket) as client:
            granted = await client.lease(spec.model_id, weights=False)
            assert client.descriptors == []
            assert (Path(granted.path) / SHARD).is_file()
            await client.used(load_ms=1.0, read_bytes=1000)
            await eventually(lambda: store.status(Tier.SSD).read_bytes_per_s > 0)
        assert store.status(Tier.DRAM).used_bytes == 0


async def test_a_client_cannot_write_to_the_pool(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 1))
        async with leased(store, spec.model_id) as (client, _):
            with pytest.raises(OSError) as caught:
                os.pwrite(client.descriptors[0], b"x", 0)
            assert caught.value.errno in (errno.EBADF, errno.EPERM)
            with pytest.raises(PermissionError):
                mmap.mmap(client.descriptors[0], CHUNK_BYTES, mmap.MAP_SHARED, mmap.PROT_WRITE)


async def test_the_least_recently_used_model_makes_room(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        a, b, c = [(await store.register(write_model(tmp_path / name, 2), name)).model_id for name in "abc"]
        for model_id in (a, b, a, c):
            await lease_once(store, model_id)
        await eventually(lambda: dram(store) == sorted([a, c]), what="b made room")
        assert store.told("evicted", Tier.DRAM) == [b]
        assert await lease_once(store, b) is Tier.SSD


async def test_a_leased_model_is_never_evicted_and_who_finds_no_room_is_told_to_ask_again(tmp_path: Path) -> None:
    sources = {name: write_model(tmp_path / name, 2, seed=ord(name)) for name in "abc"}
    async with agent(tmp_path, pool_wait_s=0.3) as store:
        a, b, c = [(await store.register(source, name)).model_id for name, source in sources.items()]
        async with leased(store, a) as (first, first_grant), leased(store, b):
            async with lease_client(store.socket) as third:
                refusal = await third.refused(c)
                assert (refusal.code, refusal.retryable) == ("pool_exhausted", True)
                assert third.progress, "who waits is kept informed"
            assert await read(first, first_grant) == written(sources["a"])
        assert await lease_once(store, c) is Tier.SSD


async def test_who_waits_for_room_gets_it_when_a_lease_ends(tmp_path: Path) -> None:
    async with agent(tmp_path, pool_wait_s=30) as store:
        a, b, c = [(await store.register(write_model(tmp_path / name, 2), name)).model_id for name in "abc"]
        async with leased(store, a), lease_client(store.socket) as third:
            async with leased(store, b):
                waiting = asyncio.create_task(third.lease(c))
                await eventually(lambda: store.status(Tier.DRAM).queue == 1, what="a lease in the queue")
            assert await read(third, await waiting) == written(tmp_path / "c")


async def test_who_leaves_while_waiting_for_room_waits_no_more(tmp_path: Path) -> None:
    async with agent(tmp_path, pool_wait_s=30) as store:
        a, b, c = [(await store.register(write_model(tmp_path / name, 2), name)).model_id for name in "abc"]
        async with leased(store, a), leased(store, b):
            async with lease_client(store.socket) as third:
                waiting = asyncio.create_task(third.lease(c))
                await eventually(lambda: store.status(Tier.DRAM).queue == 1)
                waiting.cancel()
                await asyncio.wait([waiting])
            await eventually(lambda: store.status(Tier.DRAM).queue == 0, what="nobody in the queue")


async def test_a_model_larger_than_the_pool_streams_through_a_window(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", POOL_CHUNKS + 2)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        for _ in range(2):
            async with leased(store, spec.model_id) as (client, granted):
                assert await read(client, granted) == written(source)
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="the window is given back")
        assert dram(store) == []


async def test_a_window_whose_client_is_killed_gives_its_chunks_back(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        large = await store.register(write_model(tmp_path / "large", POOL_CHUNKS + 2), "large")
        small = await store.register(write_model(tmp_path / "small", 3), "small")
        async with leased(store, large.model_id):  # reads nothing: the window is full and the reading waits
            await eventually(lambda: store.status(Tier.DRAM).used_bytes == POOL_CHUNKS * CHUNK_BYTES)
        assert await lease_once(store, small.model_id) is Tier.REMOTE
        assert store.told("refused", Tier.DRAM) == []


def flip(path: Path, offset: int) -> None:
    """A bit that rots on the disk: neither size nor time of the file changes."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def failure(store: Agent, model_id: str, error: type[StokerError]) -> StokerError:
    async with leased(store, model_id) as (client, granted):
        with pytest.raises(error) as caught:
            await read(client, granted)
    return caught.value


async def test_a_rotten_byte_on_the_ssd_is_not_served_and_the_next_lease_copies_anew(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 3)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
    copy = store.settings.ssd_path / spec.model_id / SHARD
    flip(copy, 2 * CHUNK_BYTES + 12345)
    async with agent(tmp_path, store.database) as store:
        error = await failure(store, spec.model_id, CorruptCheckpoint)
        assert SHARD in error.message
        assert str(2 * CHUNK_BYTES) in error.message
        await eventually(lambda: store.told("evicted", Tier.SSD) == [spec.model_id], what="the copy is gone")
        assert not copy.exists()
        assert store.told("refused", Tier.DRAM) == [spec.model_id]
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="its chunks are free")
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.REMOTE
            assert await read(client, granted) == written(source)


async def test_a_copy_that_was_written_to_is_not_served(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 1))
        await lease_once(store, spec.model_id)
    os.utime(store.settings.ssd_path / spec.model_id / SHARD)
    async with agent(tmp_path, store.database) as store:
        await failure(store, spec.model_id, CheckpointChanged)
        await eventually(lambda: store.held() == [])
        assert await lease_once(store, spec.model_id) is Tier.REMOTE


async def test_a_copy_whose_header_broke_is_refused_at_once_and_dropped(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 1))
        await lease_once(store, spec.model_id)
    flip(store.settings.ssd_path / spec.model_id / SHARD, 8)
    async with agent(tmp_path, store.database) as store:
        async with lease_client(store.socket) as client:
            assert (await client.refused(spec.model_id)).code == "corrupt_checkpoint"
        assert await lease_once(store, spec.model_id) is Tier.REMOTE


@pytest.mark.parametrize("lost", ["shard", "directory"])
async def test_a_copy_that_somebody_removed_is_made_anew(tmp_path: Path, lost: str) -> None:
    async with agent(tmp_path) as store:
        a, b = [(await store.register(write_model(tmp_path / name, 3), name)).model_id for name in "ab"]
        await lease_once(store, a)
        await lease_once(store, b)  # a leaves memory
        copy = store.settings.ssd_path / a
        if lost == "shard":
            (copy / SHARD).unlink()
        else:
            shutil.rmtree(copy)
        async with lease_client(store.socket) as client:
            await client.send(LeaseRequest(model_id=a, instance_id="i"))
            reply = await client.answer()
            if lost == "shard":  # its header was known
                assert isinstance(reply, LeaseGranted)
                board = _native.Board.open(client.descriptors[1])
                await eventually(lambda: board.state == _native.FAILED)
                assert board.failure()[0] == _native.READ_ERROR
        await eventually(lambda: a not in [held.model_id for held in store.held()], what="the copy is forgotten")
        assert await lease_once(store, a) is Tier.REMOTE


async def test_a_copy_of_the_first_format_is_read_without_verification(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
    record = store.settings.ssd_path / spec.model_id / "stoker.json"
    stored = msgspec.json.decode(record.read_bytes())
    stored["format"] = 1
    for file in stored["files"]:
        del file["mtime_ns"], file["chunk_digests"]
    record.write_bytes(msgspec.json.encode(stored))
    async with agent(tmp_path, store.database) as store, leased(store, spec.model_id) as (client, granted):
        assert granted.source is Tier.SSD
        assert await read(client, granted) == written(source)


async def test_a_copy_that_leaves_the_ssd_leaves_memory_too(tmp_path: Path) -> None:
    async with agent(tmp_path, ssd_capacity_bytes=2 * CHUNK_BYTES) as store:
        a, b = [(await store.register(write_model(tmp_path / name, 2), name)).model_id for name in "ab"]
        await lease_once(store, a)
        await lease_once(store, b)
        await eventually(lambda: dram(store) == [b], what="a is gone")
        assert store.status(Tier.DRAM).used_bytes == 2 * CHUNK_BYTES
        assert store.told("evicted", Tier.DRAM) == store.told("evicted", Tier.SSD) == [a]


async def test_what_a_killed_client_had_read_goes_on_to_be_read(tmp_path: Path, gate: Gate) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 2))
        async with leased(store, spec.model_id):
            assert dram(store) == []
        gate.open.set()
        await eventually(lambda: [(h.model_id, h.leases) for h in store.held(Tier.DRAM)] == [(spec.model_id, 0)])
        assert await lease_once(store, spec.model_id) is Tier.DRAM


async def test_a_stop_in_the_midst_of_a_reading_ends_it_and_its_client_hears_of_it(tmp_path: Path) -> None:
    async with agent(tmp_path, drain_s=0.1) as store:
        spec = await store.register(write_model(tmp_path / "m", POOL_CHUNKS + 2))
        async with lease_client(store.socket) as client:
            granted = await client.lease(spec.model_id)
            loaded = attached(client, granted)
            store.stop.set()
            assert await client.answer() is None
            board = _native.Board.open(client.descriptors[1])
            await eventually(lambda: board.state == _native.CANCELLED, what="the board says so")
            with loaded, pytest.raises(LoadCancelled):
                await asyncio.to_thread(lambda: list(loaded.tensors()))


async def test_leases_leave_no_descriptor_behind(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        small = (await store.register(write_model(tmp_path / "small", 1), "small")).model_id
        large = (await store.register(write_model(tmp_path / "large", POOL_CHUNKS + 1), "large")).model_id

        async def all_kinds() -> None:
            await lease_once(store, small)
            await lease_once(store, large)  # evicts the small one
            async with leased(store, large):
                pass  # never looked at
            async with lease_client(store.socket) as client:
                await client.refused("model-none")

        await all_kinds()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            await all_kinds()
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, what="no more descriptors than before")

"""The storage agent's pool: weights leased through real descriptors, against real files on a real disk."""

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.descriptors import descriptors_before
from tests.support.lease_client import lease_client
from tests.support.leasing import (
    attached,
    chunk_of,
    copied,
    dram,
    flip,
    lease_once,
    leased,
    read,
    whole,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import POOL_CHUNKS, agent
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint import _native, pool_load
from stoker_checkpoint.leased import MANIFEST
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.models import Tier
from stoker_core.errors import LoadCancelled
from stoker_storeagent.ports import OnBytes
from stoker_storeagent.sources.directory import DirectorySource


@pytest.fixture
def source_gate(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Holds up every chunk that a directory is to give, until it is set."""
    opened, read_ = asyncio.Event(), DirectorySource.read

    async def held_up(
        self: DirectorySource, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> None:
        await opened.wait()
        await read_(self, url, shard, version, offset, into, on_bytes)

    monkeypatch.setattr(DirectorySource, "read", held_up)
    return opened


@pytest.fixture
def ssd_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds up every chunk of the SSD that is being checked, until it is set."""
    opened, digest = threading.Event(), pool_load.chunk_digest

    def held_up(data: memoryview) -> str:
        assert opened.wait(30)
        return digest(data)

    monkeypatch.setattr(pool_load, "chunk_digest", held_up)
    yield opened
    opened.set()


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
        assert store.told("filling", Tier.DRAM) == store.told("filled", Tier.DRAM) == [spec.model_id]


async def test_after_a_restart_the_source_is_the_ssd(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    async with agent(tmp_path, store.database) as store:
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.SSD
            assert await read(client, granted) == written(source)
        await eventually(lambda: store.status(Tier.SSD).read_bytes_per_s > 0, what="the bandwidth of the SSD")
        assert (store.status(Tier.SSD).hits, store.status(Tier.SSD).misses) == (1, 0)


async def test_leases_at_once_read_once(tmp_path: Path, source_gate: asyncio.Event) -> None:
    source = write_model(tmp_path / "m", 2)
    async with agent(tmp_path) as store, contextlib.AsyncExitStack() as stack:
        spec = await store.register(source)
        clients = [await stack.enter_async_context(lease_client(store.socket)) for _ in range(8)]
        granted = await asyncio.gather(*(client.lease(spec.model_id) for client in clients))
        source_gate.set()
        for client, grant in zip(clients, granted, strict=True):
            assert await read(client, grant) == written(source)
        await eventually(lambda: [held.leases for held in store.held(Tier.DRAM)] == [8])
        assert store.status(Tier.DRAM).used_bytes == 2 * CHUNK_BYTES
        assert store.told("filling", Tier.DRAM) == [spec.model_id]


async def test_a_lease_is_granted_while_its_model_is_still_fetched_and_says_so(
    tmp_path: Path, source_gate: asyncio.Event
) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        async with leased(store, spec.model_id) as (client, granted):
            assert (granted.source, granted.origin) == (Tier.REMOTE, "file")
            assert store.held(Tier.DRAM) == []
            async with leased(store, spec.model_id) as (_, second):
                assert (second.source, second.origin) == (Tier.DRAM, "")
            source_gate.set()
            assert await read(client, granted) == written(source)


async def test_a_lease_is_granted_while_its_model_is_still_read_from_the_ssd(
    tmp_path: Path, ssd_gate: threading.Event
) -> None:
    source = write_model(tmp_path / "m", 2)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    async with agent(tmp_path, store.database) as store, leased(store, spec.model_id) as (client, granted):
        assert granted.source is Tier.SSD
        assert store.held(Tier.DRAM) == []
        ssd_gate.set()
        assert await read(client, granted) == written(source)


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
            await copied(store, model_id)
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
        assert await lease_once(store, c) is Tier.REMOTE


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


@pytest.mark.parametrize("position", [0, 2], ids=["with the header", "last"])
@pytest.mark.parametrize("harm", ["rotten", "shorter", "gone"])
async def test_a_chunk_that_the_ssd_lost_is_fetched_anew_while_the_load_goes_on(
    tmp_path: Path, harm: str, position: int
) -> None:
    source = write_model(tmp_path / "m", 3)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    file = chunk_of(store, source, position)
    async with agent(tmp_path, store.database) as store:
        match harm:
            case "rotten":
                flip(file)
            case "shorter":
                os.truncate(file, 12345)
            case "gone":
                file.unlink()
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.SSD
            assert await read(client, granted) == written(source)
        assert store.told("damaged", Tier.SSD) == [spec.model_id]
        assert store.said("damaged")[0]["digest"] == f"xxh3_128:{file.name}"
        await copied(store, spec.model_id)
        assert store.told("refused", Tier.DRAM) == store.told("refused", Tier.SSD) == []
        assert chunk_of(store, source, position) == file, "the next load finds it"


async def test_of_a_file_that_was_touched_only_the_contents_count(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    os.utime(chunk_of(store, source, 0))
    async with agent(tmp_path, store.database) as store:
        assert await lease_once(store, spec.model_id) is Tier.SSD
        assert store.told("damaged", Tier.SSD) == []


@pytest.mark.parametrize("harm", ["rotten", "gone", "gone with its folder"])
async def test_a_manifest_that_the_ssd_lost_is_made_anew_at_the_next_start(tmp_path: Path, harm: str) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path) as store:
        spec = await store.register(source)
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    manifest = store.settings.ssd_path / "models" / spec.model_id / MANIFEST
    match harm:
        case "rotten":
            flip(manifest, 40)
        case "gone":
            manifest.unlink()
        case _:
            shutil.rmtree(manifest.parent)
    async with agent(tmp_path, store.database) as store, leased(store, spec.model_id) as (client, granted):
        assert await read(client, granted) == written(source)


async def test_what_leaves_the_ssd_stays_in_memory(tmp_path: Path) -> None:
    sources = {name: write_model(tmp_path / name, 2, seed=ord(name)) for name in "ab"}
    async with agent(tmp_path, ssd_capacity_bytes=2 * CHUNK_BYTES) as store:
        a, b = [(await store.register(source, name)).model_id for name, source in sources.items()]
        for model_id in (a, b):
            await lease_once(store, model_id)
            await copied(store, model_id)
        await eventually(lambda: [held.model_id for held in store.held()] == [b], what="a is not on the SSD any more")
        assert store.told("evicted", Tier.SSD) == [a]
        assert store.told("evicted", Tier.DRAM) == []
        async with leased(store, a) as (client, granted):
            assert granted.source is Tier.DRAM
            assert await read(client, granted) == written(sources["a"])


async def test_what_a_killed_client_had_asked_for_goes_on_to_be_fetched(
    tmp_path: Path, source_gate: asyncio.Event
) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(write_model(tmp_path / "m", 2))
        async with leased(store, spec.model_id):
            assert dram(store) == []
        source_gate.set()
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
            await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="an empty pool")

        await all_kinds()
        await eventually(lambda: whole(store, small) and whole(store, large), what="copies on the SSD")
        await all_kinds()
        before = descriptors_before()
        for _ in range(10):
            await all_kinds()
        await eventually(lambda: descriptors_before() <= before, what="no more descriptors than before")

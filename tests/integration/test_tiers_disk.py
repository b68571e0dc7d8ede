"""A disk that rots, is full or is too small: the load goes on, and what is kept is right."""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.leasing import (
    assert_nothing_torn,
    chunk_files,
    chunk_of,
    copied,
    evicted,
    flip,
    lease_once,
    lease_right,
    refused,
    weight_bytes,
    whole,
    write_model,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.writing import Writer
from stoker_contracts.models import Tier


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


class Writes:
    """How writes to parts of chunks end. error: None: as they do.  room_bytes: that are left before it comes."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.room_bytes = 0
        self._write = Writer.write

    async def write(self, writer: Writer, fd: int, data: memoryview, offset: int) -> int:
        error = self.error  # the test may change it from another thread
        if error is not None and "/ssd/parts/" in os.readlink(f"/proc/self/fd/{fd}"):
            if self.room_bytes < len(data):
                raise OSError(error, os.strerror(error))
            self.room_bytes -= len(data)
        return await self._write(writer, fd, data, offset)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    made = Writes()
    monkeypatch.setattr(Writer, "write", lambda writer, fd, data, offset: made.write(writer, fd, data, offset))
    return made


async def test_a_chunk_that_rots_is_found_by_the_scrub_and_fetched_by_the_next_who_wants_it(
    tmp_path: Path, s3: HeldS3
) -> None:
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    file = chunk_of(store, source, 1)
    flip(file)
    async with agent(tmp_path, store.database, scrub_bytes_per_s=10**9, **s3.settings) as store:
        await eventually(lambda: store.told("damaged", Tier.SSD) == [spec.model_id], what="the scrub finds it")
        [found] = store.said("damaged")
        assert (found["digest"], found["code"]) == (f"xxh3_128:{file.name}", "corrupt_checkpoint")
        await eventually(lambda: not file.exists(), what="it is gone")
        await eventually(
            lambda: [h.held_bytes for h in store.held()] == [weight_bytes(source) - CHUNK_BYTES], what="what is left"
        )
        before = s3.weight_bytes
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        assert s3.weight_bytes == before + CHUNK_BYTES
        await copied(store, spec.model_id)
        assert_nothing_torn(store)


async def test_a_chunk_that_rots_is_found_by_the_load_and_only_that_one_is_fetched(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    flip(chunk_of(store, source, 1))
    before = s3.weight_bytes
    async with agent(tmp_path, store.database, **s3.settings) as store:
        assert await lease_right(store, spec.model_id, source) is Tier.SSD
        assert s3.weight_bytes == before + CHUNK_BYTES
        await copied(store, spec.model_id)
        assert store.told("damaged", Tier.SSD) == [spec.model_id]
        assert_nothing_torn(store)


async def test_without_a_source_a_chunk_that_rotted_fails_the_load_and_is_served_to_nobody(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.origins.PAUSE_S", 0.001)
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
        await evicted(store, spec.model_id, Tier.DRAM)
        flip(chunk_of(store, source, 0))
        s3.error = (503, "SlowDown")
        await store.prefetch(spec.model_id)
        await refused(store, "source_unavailable")
        s3.error = None
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE


async def test_a_full_disk_gives_up_other_models_first(tmp_path: Path, s3: HeldS3, writes: Writes) -> None:
    sources = {name: write_model(s3.folder(name), 2, seed=ord(name)) for name in "ab"}
    async with agent(tmp_path, **s3.settings) as store:
        a, b = [(await store.register(s3.source(name), name)).model_id for name in sources]
        await lease_once(store, a)
        await copied(store, a)

        def room_again(removed: Path, missing_ok: bool = False) -> None:
            writes.error = None
            unlink(removed, missing_ok)

        unlink = Path.unlink
        writes.error = errno.ENOSPC
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", room_again)
            assert await lease_right(store, b, sources["b"]) is Tier.REMOTE
            await copied(store, b)
        assert store.told("evicted", Tier.SSD) == [a]
        assert store.said("evicted")[0]["reason"] == "disk_full"
        assert store.told("refused", Tier.SSD) == []
        assert_nothing_torn(store)


async def test_a_disk_that_stays_full_costs_the_copy_and_not_the_load(
    tmp_path: Path, s3: HeldS3, writes: Writes
) -> None:
    sources = {name: write_model(s3.folder(name), 2, seed=ord(name)) for name in "ab"}
    async with agent(tmp_path, **s3.settings) as store:
        a, b = [(await store.register(s3.source(name), name)).model_id for name in sources]
        await lease_once(store, a)
        await copied(store, a)
        writes.error, writes.room_bytes = errno.ENOSPC, 5 * 2**20  # it comes in the midst of a chunk
        assert await lease_right(store, b, sources["b"]) is Tier.REMOTE
        await refused(store, "tier_full", Tier.SSD)
        assert store.told("evicted", Tier.SSD) == [a]
        await eventually(lambda: whole(store, b, Tier.DRAM), what="it is in memory")
        assert store.told("refused", Tier.DRAM) == []
        assert_nothing_torn(store)
        await eventually(lambda: store.status(Tier.SSD).used_bytes == 0, what="the room that was taken for it")

        writes.error = None
        await evicted(store, b, Tier.DRAM)
        assert await lease_right(store, b, sources["b"]) is Tier.REMOTE
        await copied(store, b)


async def test_a_disk_that_fails_costs_the_copy_and_not_the_load(tmp_path: Path, s3: HeldS3, writes: Writes) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        writes.error, writes.room_bytes = errno.EIO, 20 * 2**20
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await refused(store, "storage_failed", Tier.SSD)
        assert store.told("refused", Tier.DRAM) == []
        assert_nothing_torn(store)


async def test_a_model_larger_than_the_ssd_is_loaded_without_a_copy(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, ssd_capacity_bytes=2 * CHUNK_BYTES, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await refused(store, "tier_full", Tier.SSD)
        assert chunk_files(store) == []
        assert store.held() == []
        assert await lease_right(store, spec.model_id, source) is Tier.DRAM


async def test_a_model_that_needs_the_room_of_another_takes_it_before_it_arrives(tmp_path: Path, s3: HeldS3) -> None:
    sources = {name: write_model(s3.folder(name), 2, seed=ord(name)) for name in "ab"}
    async with agent(tmp_path, ssd_capacity_bytes=2 * CHUNK_BYTES, **s3.settings) as store:
        a, b = [(await store.register(s3.source(name), name)).model_id for name in sources]
        await lease_once(store, a)
        await copied(store, a)
        assert await lease_right(store, b, sources["b"]) is Tier.REMOTE
        await copied(store, b)
        assert store.told("evicted", Tier.SSD) == [a]
        assert store.said("evicted")[0]["reason"] == "room"
        assert store.status(Tier.SSD).used_bytes <= store.status(Tier.SSD).capacity_bytes
        assert len(chunk_files(store)) == 2

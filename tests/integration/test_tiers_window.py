"""Models that are larger than the pool, through a window of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.leasing import (
    assert_nothing_torn,
    chunk_files,
    chunk_of,
    copied,
    dram,
    flip,
    lease_once,
    lease_right,
    leased,
    read,
    weight_bytes,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import POOL_CHUNKS, agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.models import Tier

CHUNKS = POOL_CHUNKS + 2


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


async def test_it_streams_from_s3_and_then_from_the_ssd(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), CHUNKS)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await copied(store, spec.model_id)
        assert_nothing_torn(store)
        assert await lease_right(store, spec.model_id, source) is Tier.SSD
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="the window is given back")
        assert dram(store) == []
    assert s3.weight_bytes == weight_bytes(source)


async def test_it_streams_though_the_ssd_has_no_room_for_it(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), CHUNKS)
    async with agent(tmp_path, ssd_capacity_bytes=CHUNK_BYTES, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        for _ in range(2):
            assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        assert chunk_files(store) == []


async def test_two_streams_of_one_model_at_once_are_each_right(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 9)
    async with agent(tmp_path, pool_bytes=8 * CHUNK_BYTES, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        other = await store.register(write_model(tmp_path / "other", 4), "other")
        async with contextlib.AsyncExitStack() as stack:
            async with leased(store, other.model_id) as (client, granted):  # so that a window is half of the pool
                await read(client, granted)
                await copied(store, other.model_id)
                first = await stack.enter_async_context(leased(store, spec.model_id))
            second = await stack.enter_async_context(leased(store, spec.model_id))
            assert await asyncio.gather(read(*first), read(*second)) == 2 * [written(source)]
        await copied(store, spec.model_id)
        assert_nothing_torn(store)


async def test_it_streams_partly_from_the_ssd_of_which_a_chunk_has_rotted(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), CHUNKS)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    chunk_of(store, source, CHUNKS - 1).unlink()  # the last comes from S3, once its place in the window is free
    flip(chunk_of(store, source, 1))
    async with agent(tmp_path, store.database, **s3.settings) as store:
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await copied(store, spec.model_id)
        assert store.told("damaged", Tier.SSD) == [spec.model_id]
        assert_nothing_torn(store)

"""However many want a model at once, and whatever for: its bytes come over the network once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.lease_client import lease_client
from tests.support.leasing import (
    assert_nothing_torn,
    chunk_files,
    copied,
    leased,
    read,
    weight_bytes,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.control import Done
from stoker_contracts.models import Tier


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


async def test_leases_and_prefetches_at_once_share_one_transfer(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store, contextlib.AsyncExitStack() as stack:
        spec = await store.register(s3.source("m"))
        s3.held = {0, 1}
        clients = [await stack.enter_async_context(lease_client(store.socket)) for _ in range(6)]
        orders = (store.prefetch(spec.model_id, Tier.DRAM), store.prefetch(spec.model_id, Tier.SSD))
        granted = await asyncio.gather(*(client.lease(spec.model_id) for client in clients), *orders)
        await s3.let_go()
        for client, grant in zip(clients, granted[:6], strict=True):
            assert await read(client, grant) == written(source)
        await copied(store, spec.model_id)
        await eventually(lambda: bool(store.told("prefetch.done", Tier.SSD)), what="the end of the prefetch")
        assert store.told("filling", Tier.DRAM) == store.told("filling", Tier.SSD) == [spec.model_id]
        assert_nothing_torn(store)
    assert s3.weight_bytes == weight_bytes(source)


async def test_a_lease_joins_what_is_being_prefetched_into_memory(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {0, 1}
        assert await store.prefetch(spec.model_id, Tier.DRAM) == Done()
        await eventually(lambda: s3.waiting == {0, 1}, what="the chunks are asked for")
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.DRAM
            await s3.let_go()
            assert await read(client, granted) == written(source)
        await eventually(lambda: bool(store.told("prefetch.done", Tier.DRAM)), what="the end of the prefetch")
    assert s3.weight_bytes == weight_bytes(source)


async def test_a_lease_takes_over_what_is_being_prefetched_to_the_ssd(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.prefetch.AGAIN_S", 0.1)
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {1}
        assert await store.prefetch(spec.model_id, Tier.SSD) == Done()
        await eventually(lambda: len(chunk_files(store)) == 2, what="the chunks that are not held back")
        assert store.status(Tier.DRAM).used_bytes == 0
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.REMOTE
            await eventually(lambda: s3.waiting == {1}, what="the chunk that is missing")
            await s3.let_go()
            assert await read(client, granted) == written(source)
        await eventually(lambda: bool(store.told("prefetch.done", Tier.SSD)), what="the end of the prefetch")
        assert store.told("prefetch.failed", Tier.SSD) == []
        assert_nothing_torn(store)
    assert s3.weight_bytes == weight_bytes(source)


async def test_two_models_with_the_same_weights_lie_on_the_ssd_once(tmp_path: Path, s3: HeldS3) -> None:
    sources = {name: write_model(s3.folder(name), 2) for name in "ab"}
    async with agent(tmp_path, **s3.settings) as store:
        for name, source in sources.items():
            spec = await store.register(s3.source(name), name)
            async with leased(store, spec.model_id) as (client, granted):
                assert await read(client, granted) == written(source)
            await copied(store, spec.model_id)
        assert len(chunk_files(store)) == 2
        assert store.status(Tier.SSD).used_bytes == weight_bytes(sources["a"]) < 2 * CHUNK_BYTES

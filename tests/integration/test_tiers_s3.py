"""Models of S3 through the tiers of a node: what is there when, what stays, and what is held against what."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import pytest
from tests.support.held_s3 import HEAD_BYTES, HeldS3, held_s3
from tests.support.leasing import (
    SHARD,
    assert_nothing_torn,
    chunk_files,
    copied,
    digests_of,
    dram,
    evicted,
    failure,
    lease_once,
    lease_right,
    leased,
    read,
    read_one,
    refused,
    weight_bytes,
    write_model,
    written,
)
from tests.support.s3_server import running_moto
from tests.support.services import eventually
from tests.support.storeagent_rig import Agent, agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.models import Tier
from stoker_core.errors import SourceUnavailable


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


async def bound(store: Agent, model_id: str) -> tuple[str, ...]:
    [shard] = [f for f in await store.database.models.files(model_id, with_content=False) if f.path == SHARD]
    return shard.chunk_digests


async def test_a_lease_comes_before_the_weights_and_tensors_while_others_still_arrive(
    tmp_path: Path, s3: HeldS3
) -> None:
    source = write_model(s3.folder("m"), 3)
    tensors = written(source)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {0, 1, 2}
        async with leased(store, spec.model_id) as (client, granted):
            assert (granted.source, granted.origin) == (Tier.REMOTE, "s3")
            assert dram(store) == []
            assert s3.weight_bytes == 0
            await s3.let_go(1)
            await s3.let_go(0)
            assert await read_one(client, granted, "t0") == tensors["t0"]
            await eventually(
                lambda: [(h.held_bytes, h.leases) for h in store.held(Tier.DRAM)] == [(2 * CHUNK_BYTES, 1)],
                what="two chunks in the status",
            )
            await eventually(lambda: [h.held_bytes for h in store.held()] == [2 * CHUNK_BYTES], what="two on the SSD")
            assert store.told("filled", Tier.DRAM) == []
            await s3.let_go()
            assert await read(client, granted) == tensors
        await copied(store, spec.model_id)
        assert sorted(path.name for path in chunk_files(store)) == sorted(d[9:] for d in digests_of(source))
        assert_nothing_torn(store)
        assert s3.weight_bytes == weight_bytes(source)


async def test_what_arrived_once_is_read_from_the_ssd_in_the_next_life(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        await copied(store, spec.model_id)
    requests = s3.requests
    async with agent(tmp_path, store.database, **s3.settings) as store:
        assert await lease_right(store, spec.model_id, source) is Tier.SSD
    assert s3.requests == requests


async def test_what_a_life_did_not_get_done_is_all_that_the_next_one_fetches(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, drain_s=0.1, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {1}
        async with leased(store, spec.model_id):
            await eventually(lambda: len(chunk_files(store)) == 2, what="the chunks that are not held back")
    assert_nothing_torn(store)
    assert await bound(store, spec.model_id) == ()
    async with agent(tmp_path, store.database, **s3.settings) as store:
        assert [h.held_bytes for h in store.held()] == [weight_bytes(source) - CHUNK_BYTES]
        async with leased(store, spec.model_id) as (client, granted):
            assert granted.source is Tier.REMOTE
            assert await read_one(client, granted, "t0") == written(source)["t0"]
            await s3.let_go()
            assert await read(client, granted) == written(source)
        await copied(store, spec.model_id)
    assert s3.weight_bytes == weight_bytes(source)
    assert await bound(store, spec.model_id) == digests_of(source)


async def test_registration_reads_headers_and_small_files_and_no_weights(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        assert s3.weight_bytes == 0
        assert max(span.size_bytes for span in s3.spans) <= HEAD_BYTES
        assert await bound(store, spec.model_id) == ()
        assert spec.source == s3.source("m")
        await eventually(lambda: bool(store.events), what="the event")
        assert store.events[0]["type"] == "stoker.model.registered"
        assert store.events[0]["data"]["bytes"] > weight_bytes(source)


async def test_digests_are_bound_by_the_first_arrival_and_other_bytes_are_refused_ever_after(
    tmp_path: Path, s3: HeldS3
) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_once(store, spec.model_id)
        assert await bound(store, spec.model_id) == digests_of(source)
        await copied(store, spec.model_id)
        await evicted(store, spec.model_id, Tier.DRAM, Tier.SSD)
        assert chunk_files(store) == []

        s3.wrong_bytes = True  # with the same ETag
        await failure(store, spec.model_id, SourceUnavailable)
        await refused(store, "corrupt_checkpoint")
        assert chunk_files(store) == []
        assert await bound(store, spec.model_id) == digests_of(source)

        s3.wrong_bytes = False
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE


@pytest.mark.parametrize("known", [False, True], ids=["not fetched before", "fetched before"])
async def test_an_object_with_another_etag_is_not_what_was_registered(tmp_path: Path, s3: HeldS3, known: bool) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        if known:
            await lease_once(store, spec.model_id)
            await copied(store, spec.model_id)
            await evicted(store, spec.model_id, Tier.DRAM, Tier.SSD)
        s3.salt = "other"
        await failure(store, spec.model_id, SourceUnavailable)
        await refused(store, "checkpoint_changed")
        assert chunk_files(store) == []
        s3.salt = ""
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE


async def test_while_the_database_is_away_a_model_arrives_and_its_digests_are_bound_later(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.app.RECONCILE_S", 0.1)
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {1}
        async with leased(store, spec.model_id) as (client, granted):
            await eventually(lambda: s3.waiting == {1}, what="the last chunk is asked for")
            store.database.go_down()
            await s3.let_go()
            assert await read(client, granted) == written(source)
        await copied(store, spec.model_id)
        store.database.come_up()

        async def is_bound() -> bool:
            return await bound(store, spec.model_id) == digests_of(source)

        await eventually(is_bound, what="digests in the database")


async def test_a_model_in_moto_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    source = write_model(tmp_path / "m", 2)
    with running_moto() as url:
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="models")
        for path in source.iterdir():
            client.upload_file(str(path), "models", f"m/{path.name}")
        async with agent(tmp_path, s3_endpoint_url=url, s3_region="us-east-1") as store:
            spec = await store.register("s3://models/m")
            assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
            await copied(store, spec.model_id)
            assert await bound(store, spec.model_id) == digests_of(source)
            client.upload_file(str(source / "config.json"), "models", f"m/{SHARD}")
            await evicted(store, spec.model_id, Tier.DRAM, Tier.SSD)
            await failure(store, spec.model_id, SourceUnavailable)
            await refused(store, "checkpoint_changed")

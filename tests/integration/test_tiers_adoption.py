"""An agent that is killed, and its successor, who finds the pool as it was: its worker, in this process, kept it."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support import storeagent_process
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.keeping import Worker, worker
from tests.support.lease_client import LeaseClient, lease_client
from tests.support.leasing import SHARD, attached, copied, digests_of, lease_right, read, write_model, written
from tests.support.services import ServiceProcess, eventually, running
from tests.support.storeagent_process import NODE, System, system_of
from tests.support.storeagent_rig import POOL_CHUNKS, agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.control import Registered
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted
from stoker_core.errors import SourceUnavailable


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[Worker]:
    folder = tmp_path / "h" / "nodes" / NODE
    folder.mkdir(parents=True)
    async with worker(folder / "keeper.sock") as made:
        yield made


@pytest.fixture
def process(
    keeper: Worker, s3: HeldS3, nats_url: str, postgres_url: str, tmp_path: Path
) -> Iterator[tuple[dict[str, str], ServiceProcess]]:
    environment = storeagent_process.environment(nats_url, postgres_url, tmp_path / "h") | s3.environment
    environment["STOKER_STOREAGENT_POOL_WAIT_S"] = "0.2"
    with running("stoker_storeagent", environment, tmp_path / "log") as service:
        yield environment, service


@pytest.fixture
async def system(process: tuple[dict[str, str], ServiceProcess], tmp_path: Path) -> AsyncIterator[System]:
    environment, service = process
    async with system_of(service, environment, tmp_path / "log") as made:
        await eventually(lambda: "pool_is_kept" in service.log_text(), what="the worker keeps the pool")
        yield made


async def registered(system: System, s3: HeldS3, name: str = "m") -> str:
    reply = await system.register(name, s3.source(name))
    assert isinstance(reply, Registered), reply
    return reply.model.model_id


async def is_right(client: LeaseClient, granted: LeaseGranted, source: Path) -> bool:
    return await read(client, granted) == written(source)


async def test_a_model_that_is_complete_is_served_on_without_a_byte_from_elsewhere(
    system: System, s3: HeldS3, keeper: Worker
) -> None:
    source = write_model(s3.folder("m"), 3)
    model_id = await registered(system, s3)
    async with lease_client(system.socket) as client:
        assert await is_right(client, await client.lease(model_id), source)
        await system.copied()
    system.process.kill()
    shutil.rmtree(system.ssd / "chunks")  # nothing could be read there
    requests = s3.requests
    async with system.successor():
        assert "pool_adopted" in system.process.log_text()
        assert [(h.model_id, h.held_bytes == h.total_bytes) for h in system.held(Tier.DRAM)] == [(model_id, True)]
        assert system.held(Tier.SSD) == []
        assert system.status(Tier.DRAM).used_bytes == 3 * CHUNK_BYTES
        async with lease_client(system.socket) as client:
            granted = await client.lease(model_id)
            assert granted.source is Tier.DRAM
            assert await is_right(client, granted, source)
        assert s3.requests == requests
        assert system.process.terminate() == 0


async def test_who_still_loads_reads_on_from_the_old_pool_and_its_chunks_are_not_given_to_others(
    system: System, s3: HeldS3, keeper: Worker
) -> None:
    source, large = write_model(s3.folder("m"), 2), write_model(s3.folder("large"), POOL_CHUNKS)
    model_id, large_id = await registered(system, s3), await registered(system, s3, "large")
    keeper.starting.append("instance-1")
    async with lease_client(system.socket) as client:
        granted = await client.lease(model_id, "instance-1")
        with attached(client, granted) as loaded:
            await loaded.ready()
            await eventually(lambda: bool(system.held(Tier.DRAM)), what="it is in memory")
            system.process.kill()
            async with system.successor():
                [held] = system.held(Tier.DRAM)
                assert (held.model_id, held.leases) == (model_id, 1)
                async with lease_client(system.socket) as other:
                    assert (await other.refused(large_id)).code == "pool_exhausted"
                assert await is_right(client, granted, source)
                keeper.ended("instance-1")
                await eventually(lambda: [h.leases for h in system.held(Tier.DRAM)] == [0], what="nobody loads")
                async with lease_client(system.socket) as other:
                    assert await is_right(other, await other.lease(large_id), large)


async def test_chunks_of_a_load_that_was_cut_off_are_free_once_nobody_can_read_them(
    system: System, s3: HeldS3, keeper: Worker
) -> None:
    source = write_model(s3.folder("m"), 3)
    model_id = await registered(system, s3)
    keeper.starting.append("instance-1")
    s3.held = {2}
    async with lease_client(system.socket) as client:
        granted = await client.lease(model_id, "instance-1")
        await eventually(
            lambda: [h.held_bytes for h in system.held(Tier.SSD)] == [2 * CHUNK_BYTES], what="two chunks on the SSD"
        )
        system.process.kill()
        assert await client.answer() is None
        async with system.successor():
            assert system.held(Tier.DRAM) == []
            assert system.status(Tier.DRAM).used_bytes == 3 * CHUNK_BYTES, "instance-1 may still read from them"
            with attached(client, granted) as loaded:
                assert not loaded.wait(0.1), "nobody will complete it"
            keeper.ended("instance-1")
            await eventually(lambda: system.status(Tier.DRAM).used_bytes == 0, what="they are free")
            await s3.let_go()
            async with lease_client(system.socket) as other:
                again = await other.lease(model_id)
                assert again.source is Tier.REMOTE
                assert await is_right(other, again, source)
    assert s3.weight_bytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))


async def test_digests_are_bound_in_postgres_and_an_agent_that_forgot_everything_holds_bytes_against_them(
    system: System, s3: HeldS3
) -> None:
    source = write_model(s3.folder("m"), 2)
    model_id = await registered(system, s3)

    async def digests() -> tuple[str, ...]:
        files = await system.database.models.files(model_id, with_content=False)
        [found] = [file.chunk_digests for file in files if file.path == SHARD]
        return found

    assert await digests() == ()
    async with lease_client(system.socket) as client:
        assert await is_right(client, await client.lease(model_id), source)
    await system.copied()
    assert await digests() == digests_of(source)
    await system.evicted(model_id, Tier.DRAM)
    system.process.kill()
    shutil.rmtree(system.ssd)
    s3.wrong_bytes = True  # with the same ETag
    async with system.successor():
        async with lease_client(system.socket) as client:
            granted = await client.lease(model_id)
            with pytest.raises(SourceUnavailable):
                await read(client, granted)
        await eventually(lambda: "corrupt_checkpoint" in system.refusals(), what="the refusal")
        assert list((system.ssd / "chunks").glob("*/*")) == []
        assert await digests() == digests_of(source)


async def test_an_agent_that_ended_in_order_is_followed_the_same_way(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    folder = tmp_path / "h" / "nodes" / "n1"
    folder.mkdir(parents=True)
    async with worker(folder / "keeper.sock"):
        async with agent(tmp_path, **s3.settings) as store:
            spec = await store.register(s3.source("m"))
            assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
            await copied(store, spec.model_id)
        shutil.rmtree(store.settings.ssd_path / "chunks")
        async with agent(tmp_path, store.database, **s3.settings) as store:
            assert await lease_right(store, spec.model_id, source) is Tier.DRAM


async def test_a_pool_of_another_size_than_is_asked_for_is_not_taken_over(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    folder = tmp_path / "h" / "nodes" / "n1"
    folder.mkdir(parents=True)
    async with worker(folder / "keeper.sock"):
        async with agent(tmp_path, **s3.settings) as store:
            spec = await store.register(s3.source("m"))
            await lease_right(store, spec.model_id, source)
            await copied(store, spec.model_id)
        pool_bytes = (POOL_CHUNKS + 1) * CHUNK_BYTES
        async with agent(tmp_path, store.database, pool_bytes=pool_bytes, **s3.settings) as store:
            assert store.status(Tier.DRAM).capacity_bytes == pool_bytes
            assert await lease_right(store, spec.model_id, source) is Tier.SSD


async def test_without_a_worker_a_pool_ends_with_its_agent(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        await lease_right(store, spec.model_id, source)
        await copied(store, spec.model_id)
    async with agent(tmp_path, store.database, **s3.settings) as store:
        assert store.held(Tier.DRAM) == []
        assert await lease_right(store, spec.model_id, source) is Tier.SSD

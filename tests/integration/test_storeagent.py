"""The storage agent as a process, with real NATS and PostgreSQL."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import storeagent_process
from tests.support.lease_client import lease_client
from tests.support.leasing import SHARD, attached, write_model
from tests.support.postgres_server import RestartableServer
from tests.support.services import ServiceProcess, eventually, running
from tests.support.storeagent_process import NODE, System, system_of
from tests.support.storeagent_rig import POOL_CHUNKS
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts import subjects
from stoker_contracts.codec import encode
from stoker_contracts.control import Failed, Registered
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseRequest
from stoker_core.errors import LoadCancelled, SourceUnavailable
from stoker_worker.engines.sim import SimEngine
from stoker_worker.instance.lease import Lease


@pytest.fixture
def environment(nats_url: str, postgres_url: str, tmp_path: Path) -> dict[str, str]:
    return storeagent_process.environment(nats_url, postgres_url, tmp_path / "h")


@pytest.fixture
def process(environment: dict[str, str], tmp_path: Path) -> Iterator[ServiceProcess]:
    with running("stoker_storeagent", environment, tmp_path / "log") as service:
        yield service


@pytest.fixture
async def system(process: ServiceProcess, environment: dict[str, str], tmp_path: Path) -> AsyncIterator[System]:
    async with system_of(process, environment, tmp_path / "log") as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", shards=2)


async def test_from_registration_over_a_lease_to_status_placement_and_events(system: System, model: Path) -> None:
    reply = await system.register("tiny", model)
    assert isinstance(reply, Registered), reply
    again = await system.register("tiny", model)
    assert isinstance(again, Registered)
    assert (again.model, again.created) == (reply.model, False)

    async with lease_client(system.socket) as client:
        granted = await client.lease(reply.model.model_id)
        assert (granted.source, granted.origin) == (Tier.REMOTE, "file")
        assert (Path(granted.path) / "config.json").read_bytes() == (model / "config.json").read_bytes()
        await system.leases(1)
        await client.used(load_ms=12.5, read_bytes=granted.total_bytes)
    await system.leases(0)
    assert {s.node for s in system.statuses} == {NODE}
    weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))

    async def recorded() -> bool:
        placements = await system.database.tiers.placements(reply.model.model_id)
        samples = {t.tier: t for node, t in await system.database.tiers.latest() if node == NODE}
        loads = await system.database.tiers.observations()
        return (
            {(p.node, p.tier) for p in placements} == {(NODE, Tier.DRAM), (NODE, Tier.SSD)}
            and {p.held_bytes for p in placements} == {weight_bytes}
            and samples.keys() >= {Tier.DRAM, Tier.SSD}
            and samples[Tier.SSD].used_bytes == weight_bytes
            and samples[Tier.DRAM].used_bytes == 2 * CHUNK_BYTES  # one for each shard
            and [(o.origin, o.load_ms, o.read_bytes) for o in loads] == [("file", 12.5, reply.total_bytes)]
        )

    await eventually(recorded, what="placements, samples and observation in Postgres")
    files = await system.database.models.files(reply.model.model_id, with_content=False)
    assert len(files) == reply.files
    for file in files:
        if file.path.endswith(".safetensors"):
            assert [digest.startswith("xxh3_128:") for digest in file.chunk_digests] == [True]
        else:
            assert file.digest.startswith("sha256:")

    first, *others = await events_stored(system, 5)
    assert first["type"] == "stoker.model.registered"
    told = {tier: [e["type"] for e in others if e["data"]["tier"] == tier] for tier in (Tier.SSD, Tier.DRAM)}
    assert list(told.values()) == 2 * [["stoker.tier.filling", "stoker.tier.filled"]]

    assert system.process.terminate() == 0
    assert not system.socket.exists()


async def events_stored(system: System, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(20):
        events: list[dict[str, Any]] = []
        async for event in system.bus.follow(subjects.EVENTS_ALL, since_sequence=1):
            events.append(json.loads(event.data))
            if len(events) == count:
                return events
    raise AssertionError("the stream ended")


async def test_a_refused_directory_leaves_no_rows(system: System, tmp_path: Path) -> None:
    pickled = write_tiny_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    shardless = write_tiny_model(tmp_path / "shardless", shards=2)
    (shardless / "model-00002-of-00002.safetensors").unlink()
    broken = write_tiny_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    for source, code, reason in (
        (pickled, "refused_checkpoint", "pickle"),
        (shardless, "refused_checkpoint", "shards are missing"),
        (broken, "corrupt_checkpoint", "header length"),
        (tmp_path / "nowhere", "refused_checkpoint", "No such file"),
    ):
        reply = await system.register("tiny", source)
        assert isinstance(reply, Failed)
        assert (reply.code, reply.retryable) == (code, False)
        assert reason in reply.message
    nameless = await system.register("../tiny", pickled)
    assert isinstance(nameless, Failed)
    assert nameless.code == "invalid_model_name"
    assert await system.database.models.all() == []


async def test_small_files_are_what_was_registered_whatever_became_of_the_source(system: System, model: Path) -> None:
    reply = await system.register("tiny", model)
    assert isinstance(reply, Registered)
    registered = (model / "generation_config.json").read_bytes()
    (model / "generation_config.json").write_text('{"_from_model_config": tru}')
    async with lease_client(system.socket) as client:
        granted = await client.lease(reply.model.model_id)
        assert (Path(granted.path) / "generation_config.json").read_bytes() == registered


async def test_weights_that_changed_after_registration_are_not_served(system: System, tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 2)
    reply = await system.register("m", source)
    assert isinstance(reply, Registered)
    os.truncate(source / SHARD, CHUNK_BYTES + 1)
    async with lease_client(system.socket) as client:
        granted = await client.lease(reply.model.model_id)
        with attached(client, granted) as loaded, pytest.raises(SourceUnavailable):
            await loaded.ready()
    await eventually(lambda: any(e["type"] == "stoker.tier.refused" for e in system.events), what="the refusal")
    [refused] = [event["data"] for event in system.events if event["type"] == "stoker.tier.refused"]
    assert (refused["tier"], refused["code"]) == (Tier.DRAM, "checkpoint_changed")
    assert list((system.ssd / "chunks").glob("*/*")) == []
    assert await system.database.tiers.placements() == []


CLIENT = """
import socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
link.sendall(sys.argv[2].encode() + b"\\n")
for line in link.makefile("rb"):
    if b"granted" in line:
        print("granted", flush=True)
"""


async def test_a_killed_process_frees_its_lease(system: System, model: Path) -> None:
    reply = await system.register("tiny", model)
    assert isinstance(reply, Registered)
    request = encode(LeaseRequest(model_id=reply.model.model_id, instance_id="i")).decode()
    child = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(system.socket), request], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert await asyncio.to_thread(child.stdout.readline) == "granted\n"
        await system.leases(1)
    finally:
        child.send_signal(signal.SIGKILL)
        await asyncio.to_thread(child.wait)
    await system.leases(0)


async def test_while_postgres_is_down_what_is_here_is_leased_and_the_rest_answered(
    system: System, model: Path, postgres_server: RestartableServer
) -> None:
    reply = await system.register("tiny", model)
    other = await system.register("other", model)
    assert isinstance(reply, Registered)
    assert isinstance(other, Registered)
    async with lease_client(system.socket) as client:
        await client.lease(reply.model.model_id)
    postgres_server.kill()

    async with lease_client(system.socket) as client:
        granted = await client.lease(reply.model.model_id)
        assert granted.source is Tier.DRAM
        await client.used(load_ms=3.0, read_bytes=7)
    async with lease_client(system.socket) as client:
        refusal = await client.refused(other.model.model_id)
        assert (refusal.code, refusal.retryable) == ("database_unavailable", True)
    failed = await system.register("third", model)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("database_unavailable", True)

    postgres_server.start()  # not in a thread: the server dies with the thread that started it

    async def caught_up() -> bool:
        return [o.read_bytes for o in await system.database.tiers.observations()] == [7]

    await eventually(caught_up, what="the observation that waited")
    async with lease_client(system.socket) as client:
        await client.lease(other.model.model_id)
    assert system.process.process.poll() is None


async def test_after_kill_9_the_copy_is_adopted_and_the_socket_taken_over(system: System, model: Path) -> None:
    reply = await system.register("tiny", model)
    assert isinstance(reply, Registered)
    async with lease_client(system.socket) as client:
        await client.lease(reply.model.model_id)
        await system.copied()
        system.process.kill()
        assert await client.answer() is None
    (system.ssd / ".tmp-half-a-folder").mkdir()
    async with system.successor():
        async with lease_client(system.socket) as client:
            assert (await client.lease(reply.model.model_id)).source is Tier.SSD
        await system.leases(0)
        assert sorted(path.name for path in system.ssd.iterdir()) == ["chunks", "models", "parts"]
        assert [path.name for path in (system.ssd / "models").iterdir()] == [reply.model.model_id]
    assert len({status.boot_id for status in system.statuses}) == 1


async def test_an_agent_killed_in_mid_load_ends_the_load_soon_and_its_successor_serves_the_next(
    system: System, tmp_path: Path
) -> None:
    # Larger than the pool: without the agent this load cannot end.
    source = write_model(tmp_path / "large", POOL_CHUNKS + 2)
    reply = await system.register("large", source)
    assert isinstance(reply, Registered)

    def lease() -> Lease:
        return Lease(system.socket, model_id=reply.model.model_id, instance_id="i", timeout_s=30.0)

    def started(held: Lease) -> SimEngine:
        with held:
            return SimEngine(reply.model, held, step_s=0.0)

    held = await asyncio.to_thread(lease)
    system.process.process.send_signal(signal.SIGSTOP)  # so that it cannot end before the kill either
    starting = asyncio.create_task(asyncio.to_thread(started, held))
    os.waitid(os.P_PID, system.process.pid, os.WSTOPPED)
    system.process.kill()
    with pytest.raises(LoadCancelled):
        async with asyncio.timeout(5):
            await starting

    with running("stoker_storeagent", system.environment, system.log):
        engine = await asyncio.to_thread(lambda: started(lease()))
        assert engine.load_ms > 0


async def test_a_second_agent_of_the_same_node_does_not_start(system: System, tmp_path: Path) -> None:
    await eventually(lambda: bool(system.statuses), what="the first agent")
    # No pool can be made of this, nor is one: the first thing is to find out that the node has an agent.
    environment = system.environment | {"STOKER_STOREAGENT_POOL_BYTES": "1"}
    with running("stoker_storeagent", environment, tmp_path / "second") as second:
        assert await asyncio.to_thread(second.process.wait, 30) == 1
        assert "another storage agent listens" in second.log_text()
    assert system.process.process.poll() is None
    async with lease_client(system.socket) as client:
        assert (await client.refused("model-none")).code == "model_not_found"

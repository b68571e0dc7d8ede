"""kill -9 of a storage agent in the middle of a download, again and again: what it had is not fetched a second time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.support import storeagent_process
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.lease_client import lease_client
from tests.support.leasing import SHARD, digests_of, weight_bytes, write_model
from tests.support.services import eventually, running
from tests.support.storeagent_process import NODE, System, system_of

from stoker_bus.port import ask
from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts import subjects
from stoker_contracts.control import CommandReply, Done, PrefetchModel, Registered
from stoker_contracts.models import Tier
from stoker_core.errors import NoResponders

CHUNKS = 18  # 295 MB
KILLS = 10
BYTES_PER_S = 40_000_000  # so slow that all kills fit in
SENT_SHARE_MAX = 1.1

Wanting = Callable[[System, str], AbstractAsyncContextManager[None]]
"""(system, model id): ask the agent that runs now for a model, and want it for the duration of a block."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path, bytes_per_s=BYTES_PER_S) as server:
        yield server


@pytest.fixture
async def system(s3: HeldS3, nats_url: str, postgres_url: str, tmp_path: Path) -> AsyncIterator[System]:
    settings = {"POOL_BYTES": (CHUNKS + 2) * CHUNK_BYTES, "POOL_HUGE": "none", "POOL_LOCK": False}
    own = {f"STOKER_STOREAGENT_{key}": str(value) for key, value in settings.items()}
    environment = storeagent_process.environment(nats_url, postgres_url, tmp_path / "h") | s3.environment | own
    with running("stoker_storeagent", environment, tmp_path / "log") as service:
        async with system_of(service, environment, tmp_path / "log") as made:
            yield made


@asynccontextmanager
async def leased(system: System, model_id: str) -> AsyncIterator[None]:
    """As an instance that starts: into memory, and to the disk beside."""
    async with lease_client(system.socket) as client:
        await client.lease(model_id)
        yield


@asynccontextmanager
async def prefetched(system: System, model_id: str) -> AsyncIterator[None]:
    """To the disk alone."""
    order = PrefetchModel(model_id=model_id, tier=Tier.SSD, term=1)

    async def ordered() -> bool:
        try:
            reply = await ask(system.bus, subjects.store_prefetch(NODE), order, CommandReply, timeout_s=5.0)
        except NoResponders:  # it is still starting
            return False
        return isinstance(reply, Done)

    await eventually(ordered, what="the order")
    yield


def kill_points(seed: int, total_bytes: int) -> list[int]:
    """Bytes that the server has sent in all at each kill."""
    return sorted(int(share * total_bytes) for share in np.random.default_rng(seed).uniform(0.02, 0.98, KILLS))


async def killed_at(points: list[int], system: System, s3: HeldS3, model_id: str, wanting: Wanting) -> None:
    """Kill the agent and start it again at each point, then let it end its work."""

    async def until_sent(point: int) -> None:
        async with wanting(system, model_id):
            await eventually(lambda: s3.weight_bytes >= point, what=lambda: f"byte {point}, not {s3.weight_bytes}")
            system.process.kill()

    await until_sent(points[0])
    for point in points[1:]:
        async with system.successor():
            await until_sent(point)
    async with system.successor(), wanting(system, model_id):
        await system.copied()
        assert system.process.terminate() == 0


@pytest.mark.parametrize(
    ("bound", "wanting", "seed"),
    [
        pytest.param(False, leased, 1, id="on its first arrival, for an instance"),
        pytest.param(True, prefetched, 2, id="with digests that are known, to the disk alone"),
    ],
)
async def test_ten_kills_cost_less_than_a_tenth_of_the_download(
    system: System, s3: HeldS3, bound: bool, wanting: Wanting, seed: int
) -> None:
    source = write_model(s3.folder("m"), CHUNKS)
    digests, total_bytes = digests_of(source), weight_bytes(source)
    reply = await system.register("m", s3.source("m"))
    assert isinstance(reply, Registered), reply
    model_id = reply.model.model_id
    if bound:
        await system.database.models.bind_chunks(model_id, {SHARD: digests})

    await killed_at(kill_points(seed, total_bytes), system, s3, model_id, wanting)

    files = {path.name: path for path in (system.ssd / "chunks").glob("*/*")}
    assert {f"xxh3_128:{name}" for name in files} == set(digests)
    assert all(chunk_digest(path.read_bytes()) == f"xxh3_128:{name}" for name, path in files.items())
    [shard] = [f for f in await system.database.models.files(model_id, with_content=False) if f.path == SHARD]
    assert shard.chunk_digests == digests
    assert s3.weight_bytes <= SENT_SHARE_MAX * total_bytes, f"sent {s3.weight_bytes / total_bytes:.3f} of the model"

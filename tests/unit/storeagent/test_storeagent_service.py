"""The whole storage agent on the memory bus and database, with its real socket and directory."""

import asyncio
import socket
import stat
from pathlib import Path

import pytest
from tests.support.lease_client import lease_client
from tests.support.leasing import whole
from tests.support.services import eventually
from tests.support.storeagent_rig import Agent, agent
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint.header import bare_header
from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_contracts.models import Tier
from stoker_contracts.storage import LINE_LIMIT_BYTES, LeaseGranted, LeaseRefused
from stoker_core.errors import InvalidSettings
from stoker_storeagent import leases
from stoker_storeagent.leases import close, listen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


async def test_a_lease_over_the_socket_and_what_is_said_of_it(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            granted = await client.lease(spec.model_id)
            folder, manifest = Path(granted.path), open_checkpoint(model)
            [shard] = manifest.shards
            assert (folder / shard.name).read_bytes() == bare_header(shard), "no weights: these are in the pool"
            assert [s.tensors for s in read_manifest(folder).shards] == [s.tensors for s in manifest.shards]
            assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
            assert (granted.source, granted.origin) == (Tier.REMOTE, "file")
            await has_leases(store, 1)
            await client.used(load_ms=100.0, read_bytes=granted.total_bytes)
            await eventually(lambda: store.status(Tier.REMOTE).read_bytes_per_s > 0, what="the source's bandwidth")
        await has_leases(store, 0)
        await eventually(lambda: whole(store, spec.model_id), what="the copy on the SSD")
        assert [held.total_bytes for held in store.held() + store.held(Tier.DRAM)] == 2 * [manifest.file_bytes]
        [seen] = await store.database.tiers.observations()
        assert (seen.model_id, seen.node) == (spec.model_id, "n1")
        assert (seen.source, seen.origin) == (Tier.REMOTE, "file")
        assert (seen.read_bytes, seen.load_ms) == (granted.total_bytes, 100.0)
        await eventually(lambda: placed(store), what="the placements")
        assert [s.seq for s in store.statuses] == list(range(1, len(store.statuses) + 1))
        assert {s.boot_id for s in store.statuses} == {"boot-n1"}


async def has_leases(store: Agent, count: int) -> None:
    """Until the one model in memory has that many."""
    await eventually(lambda: [h.leases for h in store.held(Tier.DRAM)] == [count], what=f"{count} leases in the status")


async def placed(store: Agent) -> bool:
    return {p.tier for p in await store.database.tiers.placements()} == {Tier.DRAM, Tier.SSD}


async def test_a_killed_client_frees_its_lease(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)
            await has_leases(store, 1)
            client.close()
            await has_leases(store, 0)


async def test_only_this_user_may_use_the_socket(tmp_path: Path) -> None:
    async with agent(tmp_path) as store:
        assert stat.S_IMODE(store.socket.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"hello\n",
        b'{"model_id":1,"instance_id":"i"}\n',
        b"\xff\n",
        b"x" * (LINE_LIMIT_BYTES + 2) + b"\n",
    ],
)
async def test_a_bad_line_is_refused_and_the_next_client_served(tmp_path: Path, model: Path, line: bytes) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.write(line)
            refusal = await client.answer()
            assert isinstance(refusal, LeaseRefused)
            assert (refusal.code, refusal.retryable) == ("invalid_message", False)
            assert await client.answer() is None
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)


@pytest.mark.parametrize("line", [b"{}\n", b'{"load_ms":-1,"read_bytes":1}\n', b'{"load_ms":1,"read_bytes":-1}\n'])
async def test_a_bad_observation_ends_the_lease_and_is_not_stored(tmp_path: Path, model: Path, line: bytes) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)
            await client.write(line)
            refusal = await client.answer()
            assert isinstance(refusal, LeaseRefused)
            assert refusal.code == "invalid_message"
        await has_leases(store, 0)
        assert await store.database.tiers.observations() == []


async def test_an_unknown_model_is_refused_by_code(tmp_path: Path) -> None:
    async with agent(tmp_path) as store, lease_client(store.socket) as client:
        refusal = await client.refused("model-none")
        assert (refusal.code, refusal.retryable) == ("model_not_found", False)


async def test_connections_are_bounded(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path, leases_max=1) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as first:
            await first.lease(spec.model_id)
            async with lease_client(store.socket) as second:
                refusal = await second.refused(spec.model_id)
                assert (refusal.code, refusal.retryable) == ("overloaded", True)

        async def free() -> bool:
            async with lease_client(store.socket) as third:
                await third.write(b'{"model_id":"' + spec.model_id.encode() + b'","instance_id":"i"}\n')
                return isinstance(await third.answer(), LeaseGranted)

        await eventually(free, what="room after the first has left")


async def test_observations_wait_for_the_database(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)
        store.database.go_down()
        async with lease_client(store.socket) as client:
            granted = await client.lease(spec.model_id)
            assert granted.source is Tier.DRAM
            await client.used(load_ms=5.0, read_bytes=7)
        await asyncio.sleep(0)
        store.database.come_up()

        async def seen() -> bool:
            return [o.read_bytes for o in await store.database.tiers.observations()] == [7]

        await eventually(seen, what="the observation, late")


async def test_a_restart_keeps_what_was_copied(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)
            await eventually(lambda: whole(store, spec.model_id), what="the copy on the SSD")
    store.database.go_down()  # nothing is asked of it
    async with agent(tmp_path, store.database) as store, lease_client(store.socket) as client:
        assert (await client.lease(spec.model_id)).source is Tier.SSD
        await eventually(lambda: whole(store, spec.model_id, Tier.DRAM), what="the model in memory")


async def test_what_was_not_leased_before_is_found_once_the_database_is_back(tmp_path: Path, model: Path) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        store.database.go_down()
        async with lease_client(store.socket) as client:
            refusal = await client.refused(spec.model_id)
            assert (refusal.code, refusal.retryable) == ("database_unavailable", True)
        store.database.come_up()
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    dead = listen(path)
    dead.close()
    assert path.exists()
    live = listen(path)
    with pytest.raises(InvalidSettings, match="another storage agent listens"):
        listen(path)
    close(live)
    assert not path.exists()


async def test_an_agent_too_busy_to_accept_is_still_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BACKLOG", 0)
    path = tmp_path / "s.sock"
    busy = listen(path)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(path))
        with pytest.raises(InvalidSettings, match="another storage agent listens"):
            listen(path)
    close(busy)


async def test_a_successor_that_takes_the_socket_over_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so from the moment that the predecessor answers no more."""
    path, made = tmp_path / "s.sock", []
    old = listen(path)

    def taken_over(listener: socket.socket) -> None:
        socket.socket.close(listener)
        made.append(listen(path))

    class Closing:
        getsockname, close = old.getsockname, lambda _: taken_over(old)

    close(Closing())  # type: ignore[arg-type]
    assert path.exists()
    close(made[0])


@pytest.mark.parametrize("read_bytes", [-1, 1 << 63])
async def test_a_count_that_no_database_can_hold_is_refused_and_harms_nobody(
    tmp_path: Path, model: Path, read_bytes: int
) -> None:
    async with agent(tmp_path) as store:
        spec = await store.register(model)
        async with lease_client(store.socket) as client:
            await client.lease(spec.model_id)
            await client.used(load_ms=5.0, read_bytes=read_bytes)
            reply = await client.answer()
            assert isinstance(reply, LeaseRefused)
            assert reply.code == "invalid_message"
        assert await store.database.tiers.observations() == []


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(InvalidSettings, match="is no socket"):
        listen(path)
    assert path.read_text() == "precious"

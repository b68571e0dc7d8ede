"""Nodes that take chunks from one another, and what becomes of a load whose peer fails it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.leasing import (
    assert_nothing_torn,
    chunk_of,
    copied,
    evicted,
    flip,
    lease_once,
    lease_right,
    leased,
    read,
    weight_bytes,
    whole,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import Agent, agent

from stoker_bus.memory import MemoryBroker
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.models import Tier
from stoker_db.memory import MemoryDatabase
from stoker_storeagent.peers.client import PeerClient
from stoker_storeagent.peers.sockets import Sending

TOKEN = "a token of the cluster"


class Cluster:
    """Nodes on one bus and one database, with one S3."""

    def __init__(self, tmp_path: Path, s3: HeldS3) -> None:
        self.s3 = s3
        self._tmp_path, self._broker, self._database = tmp_path, MemoryBroker(), MemoryDatabase()

    def node(self, name: str, **settings: object) -> contextlib.AbstractAsyncContextManager[Agent]:
        own = {"cluster_token": TOKEN} | self.s3.settings
        return agent(self._tmp_path, self._database, node=name, broker=self._broker, drain_s=0.1, **(own | settings))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with held_s3(tmp_path) as server:
        yield Cluster(tmp_path, server)


class Halt:
    """Stops peers that send in mid-chunk, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.halted = 0
        self._forever = asyncio.Event()

    async def wait(self) -> None:
        self.halted += 1
        await self._forever.wait()


@pytest.fixture
def halt(monkeypatch: pytest.MonkeyPatch) -> Halt:
    made, piece = Halt(), Sending._piece

    async def halted(
        self: Sending, connection: object, fd: int, offset: int, size_bytes: int, *, in_memory: bool
    ) -> None:
        if made.on and offset % CHUNK_BYTES:  # of a pool, as of a file of one chunk: not the first piece
            await made.wait()
        await piece(self, connection, fd, offset, size_bytes, in_memory=in_memory)  # type: ignore[arg-type]

    monkeypatch.setattr(Sending, "_piece", halted)
    return made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PeerClient.__init__.__kwdefaults__, "wait_s", 30.0)


async def first_has(first: Agent, name: str = "m") -> str:
    """A model that lies whole on the first node. Returns its id."""
    spec = await first.register(f"s3://models/{name}", name)
    await lease_once(first, spec.model_id)
    await copied(first, spec.model_id)
    return spec.model_id


async def suspected(store: Agent) -> list[str]:
    await eventually(lambda: bool(store.said("peer_suspected")), what="a suspicion")
    return [data["peer"] for data in store.said("peer_suspected")]


async def test_the_second_node_takes_a_model_from_the_first(cluster: Cluster) -> None:
    source = write_model(cluster.s3.folder("m"), 3)
    async with cluster.node("n1") as first, cluster.node("n2") as second:
        model_id = await first_has(first)
        async with leased(second, model_id) as (client, granted):
            assert (granted.source, granted.origin) == (Tier.PEER, "n1")
            assert await read(client, granted) == written(source)
            await client.used(load_ms=1.0, read_bytes=1)
        await copied(second, model_id)
        assert_nothing_torn(second)
        assert cluster.s3.weight_bytes == weight_bytes(source)
        await eventually(lambda: bool(second.statuses[-1].links), what="the link in the status")
        [link] = second.statuses[-1].links
        assert (link.peer, link.read_bytes) == ("n1", weight_bytes(source))
        assert second.status(Tier.PEER).hits == 1

        async def observed() -> bool:
            return [(o.node, o.source, o.origin) for o in await second.database.tiers.observations()] == [
                ("n2", Tier.PEER, "n1")
            ]

        await eventually(observed, what="the observation")


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
async def test_a_peer_gives_from_whichever_tier_has_it(cluster: Cluster, tier: Tier) -> None:
    source = write_model(cluster.s3.folder("m"), 2)
    async with cluster.node("n1") as first, cluster.node("n2") as second:
        model_id = await first_has(first)
        await evicted(first, model_id, Tier.SSD if tier is Tier.DRAM else Tier.DRAM)
        assert await lease_right(second, model_id, source) is Tier.PEER
    assert cluster.s3.weight_bytes == weight_bytes(source)


@pytest.mark.usefixtures("patient")
async def test_a_chain_of_nodes_passes_on_what_is_still_arriving(cluster: Cluster) -> None:
    source = write_model(cluster.s3.folder("m"), 3)
    async with cluster.node("n1") as first, cluster.node("n2") as second, cluster.node("n3") as third:
        spec = await first.register("s3://models/m")
        cluster.s3.held = {2}

        def two(store: Agent) -> bool:
            return [h.held_bytes for h in store.held(Tier.DRAM)] == [2 * CHUNK_BYTES]

        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for store, origin in ((first, "s3"), (second, "n1"), (third, "n2")):
                client, granted = await stack.enter_async_context(leased(store, spec.model_id))
                assert granted.origin == origin
                clients.append((client, granted))
                await eventually(lambda store=store: two(store), what="what is there already")
            located = await third.locate(spec.model_id)
            assert (located.receiving, located.upstream) == (True, ("n2", "n1"))
            await cluster.s3.let_go()
            for client, granted in clients:
                assert await read(client, granted) == written(source)
        for store in (first, second, third):
            await copied(store, spec.model_id)
            assert_nothing_torn(store)
    assert cluster.s3.weight_bytes == weight_bytes(source)


async def test_a_peer_that_dies_in_mid_chunk_is_replaced_by_the_source(cluster: Cluster, halt: Halt) -> None:
    source = write_model(cluster.s3.folder("m"), 2)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(cluster.node("n1"))
        async with cluster.node("n2") as second:
            model_id = await first_has(first)
            halt.on = True
            async with leased(second, model_id) as (client, granted):
                assert granted.origin == "n1"
                await eventually(lambda: halt.halted == 2, what="both chunks are half there")
                await stack.aclose()
                assert await read(client, granted) == written(source)
            assert await suspected(second) == ["n1"]
            await copied(second, model_id)
            assert_nothing_torn(second)
    sent = cluster.s3.weight_bytes
    assert weight_bytes(source) < sent < 2 * weight_bytes(source), "what the peer gave is not fetched again"


async def test_a_peer_that_stalls_is_replaced_and_the_next_node_has_two_to_choose_from(
    cluster: Cluster, halt: Halt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PeerClient.__init__.__kwdefaults__, "stall_s", 0.5)
    source = write_model(cluster.s3.folder("m"), 1)
    async with cluster.node("n1") as first, cluster.node("n2") as second:
        model_id = await first_has(first)
        halt.on = True
        assert await lease_right(second, model_id, source) is Tier.PEER
        assert await suspected(second) == ["n1"]
        async with cluster.node("n3") as third:
            halt.on = False
            await eventually(lambda: whole(second, model_id), what="the model on the second node")
            async with leased(third, model_id) as (client, granted):
                assert granted.source is Tier.PEER
                assert await read(client, granted) == written(source)
        assert_nothing_torn(second)


async def test_a_peer_that_gives_wrong_bytes_is_found_out_and_they_go_nowhere(cluster: Cluster) -> None:
    source = write_model(cluster.s3.folder("m"), 3)
    async with cluster.node("n1") as first:
        model_id = await first_has(first)
    async with cluster.node("n1") as first, cluster.node("n2") as second:  # another life: nothing is in memory
        assert first.held(Tier.DRAM) == []
        flip(chunk_of(first, source, 1))
        async with leased(second, model_id) as (client, granted):
            assert granted.origin == "n1"
            assert await read(client, granted) == written(source)
        assert await suspected(second) == ["n1"]
        assert "digest" in second.said("peer_suspected")[0]["reason"]
        await copied(second, model_id)
        assert_nothing_torn(second)
        assert second.said("refused") == []


async def test_who_is_suspected_is_left_out_for_a_while(cluster: Cluster) -> None:
    sources = {name: write_model(cluster.s3.folder(name), 1, seed=ord(name)) for name in "ab"}
    async with cluster.node("n1") as first:
        a, b = [await first_has(first, name) for name in "ab"]
    async with cluster.node("n1") as first, cluster.node("n2") as second:
        flip(chunk_of(first, sources["a"], 0))
        assert await lease_right(second, a, sources["a"]) is Tier.PEER
        assert await suspected(second) == ["n1"]
        assert await lease_right(second, b, sources["b"]) is Tier.REMOTE


async def test_without_the_cluster_s_token_a_node_helps_itself(cluster: Cluster) -> None:
    source = write_model(cluster.s3.folder("m"), 1)
    async with (
        cluster.node("n1") as first,
        cluster.node("n2", cluster_token="a token of another one") as second,
        cluster.node("n3", cluster_token="") as third,
    ):
        model_id = await first_has(first)
        await lease_right(second, model_id, source)
        assert await suspected(second) == ["n1"]
        assert await lease_right(third, model_id, source) is Tier.REMOTE
        assert third.statuses[-1].address == ""
    assert cluster.s3.weight_bytes == 3 * weight_bytes(source)


async def test_a_peer_serves_a_node_whose_source_is_gone(cluster: Cluster) -> None:
    source = write_model(cluster.s3.folder("m"), 2)
    async with cluster.node("n1") as first, cluster.node("n2") as second:
        model_id = await first_has(first)
        cluster.s3.error = (503, "SlowDown")
        assert await lease_right(second, model_id, source) is Tier.PEER


async def test_an_order_names_the_peer_to_take_it_from(cluster: Cluster) -> None:
    write_model(cluster.s3.folder("m"), 1)
    async with cluster.node("n1") as first, cluster.node("n2") as second, cluster.node("n3") as third:
        model_id = await first_has(first)
        await second.prefetch(model_id, Tier.SSD)
        await copied(second, model_id)
        await third.prefetch(model_id, Tier.DRAM, sources=("n2", "n1"))
        await eventually(lambda: bool(third.said("prefetch.done")), what="the end of the prefetch")
        assert [data["origin"] for data in third.said("filled") if data["tier"] == Tier.DRAM] == ["n2"]

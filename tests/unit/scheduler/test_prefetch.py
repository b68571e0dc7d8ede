"""Bringing models to nodes: what the leader orders of storage agents that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from tests.support.fake_worker import GIB, model_spec
from tests.unit.scheduler.rig import SETTINGS, Rig, World, settle

from stoker_bus.port import Bus, Message, answer, ask, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    CancelPrefetch,
    CommandReply,
    Done,
    Failed,
    HeldModel,
    LinkStatus,
    PrefetchModel,
    StoreStatus,
    WantPrefetch,
)
from stoker_contracts.models import Tier
from stoker_core.errors import StaleTerm


class Agent:
    """heard: orders, as they came.  reply: what they are answered; None: nothing."""

    def __init__(self, bus: Bus, node: str) -> None:
        self.bus, self.node = bus, node
        self.heard: list[PrefetchModel | CancelPrefetch] = []
        self.reply: Done | Failed | None = Done()
        self.seq = 0

    async def listen(self) -> None:
        async def on_prefetch(message: Message) -> None:
            await self._take(message, decode(PrefetchModel, message.data))

        async def on_cancel(message: Message) -> None:
            await self._take(message, decode(CancelPrefetch, message.data))

        await self.bus.subscribe(subjects.store_prefetch(self.node), on_prefetch)
        await self.bus.subscribe(subjects.store_cancel(self.node), on_cancel)

    async def say(
        self, *held: tuple[str, Tier, int], address: str = "here:1", links: Iterable[tuple[str, float]] = ()
    ) -> None:
        """held: model, tier, bytes of GIB."""
        self.seq += 1
        status = StoreStatus(
            node=self.node,
            boot_id="s1",
            seq=self.seq,
            tiers=(),
            held=tuple(HeldModel(model_id=m, tier=t, held_bytes=h, total_bytes=GIB) for m, t, h in held),
            address=address,
            links=tuple(LinkStatus(peer=peer, read_bytes_per_s=rate) for peer, rate in links),
        )
        await send(self.bus, subjects.status_store(self.node), status)
        await settle()

    async def _take(self, message: Message, order: PrefetchModel | CancelPrefetch) -> None:
        self.heard.append(order)
        if self.reply:
            await answer(self.bus, message, self.reply)


@pytest.fixture
async def world() -> World:
    world = World()
    await world.register(model_spec("a"))
    return world


@asynccontextmanager
async def cluster(world: World, *nodes: str) -> AsyncIterator[tuple[Rig, dict[str, Agent]]]:
    """A leader and live storage agents that hold nothing."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(world.leader())
        agents = {}
        for node in nodes:
            bus = world.broker.connect()
            stack.push_async_callback(bus.close)
            agents[node] = Agent(bus, node)
            await agents[node].listen()
            await agents[node].say()
        yield rig, agents


async def want(rig: Rig, model_id: str = "a", *nodes: str, **fields: object) -> CommandReply:
    message = WantPrefetch(model_id=model_id, nodes=nodes, **fields)  # type: ignore[arg-type]
    bus = rig.world.broker.connect()
    reply: CommandReply = await ask(bus, subjects.SCHEDULER_PREFETCH, message, CommandReply, timeout_s=5)
    await bus.close()
    await settle()
    return reply


def sources(agents: dict[str, Agent]) -> dict[str, tuple[str, ...]]:
    return {
        node: order.sources
        for node, agent in agents.items()
        for order in agent.heard
        if isinstance(order, PrefetchModel)
    }


async def test_without_names_all_live_nodes_are_ordered_and_chain_behind_who_holds_all_of_it(world: World) -> None:
    async with cluster(world, "n1", "n2", "n3") as (rig, agents):
        await agents["n2"].say(("a", Tier.SSD, GIB))
        await agents["n3"].say(("a", Tier.DRAM, GIB - 1))
        assert await want(rig) == Done()
        assert sources(agents) == {"n1": ("n2",), "n2": (), "n3": ("n1", "n2")}


async def test_an_order_carries_what_was_wanted_and_the_leaders_term(world: World) -> None:
    async with cluster(world, "n1", "n2") as (rig, agents):
        assert await want(rig, "a", "n2", tier=Tier.SSD, priority=3, budget_ms=700) == Done()
        assert agents["n1"].heard == []
        assert agents["n2"].heard == [
            PrefetchModel(model_id="a", tier=Tier.SSD, term=1, priority=3, budget_ms=700, sources=())
        ]


async def test_the_nodes_with_the_fastest_links_stand_first_in_the_chain(world: World) -> None:
    async with cluster(world, "n1", "n2", "n3") as (rig, agents):
        await agents["n1"].say(links=[("x", 1e9)])
        await agents["n3"].say(links=[("x", 9e9)])
        await want(rig)
        assert sources(agents) == {"n3": (), "n2": ("n3",), "n1": ("n2",)}


async def test_a_node_that_serves_no_peers_is_in_no_chain(world: World) -> None:
    async with cluster(world, "n1", "n2") as (rig, agents):
        await agents["n1"].say(("a", Tier.SSD, GIB), address="")
        await want(rig)
        assert sources(agents) == {"n1": (), "n2": ()}


async def test_a_cancel_goes_to_the_nodes_that_are_named(world: World) -> None:
    async with cluster(world, "n1", "n2") as (rig, agents):
        assert await want(rig, "a", "n1", cancel=True) == Done()
        assert agents["n1"].heard == [CancelPrefetch(model_id="a", term=1)]
        assert agents["n2"].heard == []


async def test_an_unknown_model_or_node_is_refused_and_nobody_is_ordered(world: World) -> None:
    async with cluster(world, "n1") as (rig, agents):
        for reply, code in (
            (await want(rig, "z"), "model_not_found"),
            (await want(rig, "a", "n1", "n9"), "no_node"),
            (await want(rig, "a", tier=Tier.GPU), "invalid_request"),
        ):
            assert isinstance(reply, Failed)
            assert reply.code == code
        assert agents["n1"].heard == []


async def test_without_a_live_node_it_is_refused_as_something_to_try_again(world: World) -> None:
    async with cluster(world) as (rig, _):
        reply = await want(rig)
        assert isinstance(reply, Failed)
        assert (reply.code, reply.retryable) == ("no_node", True)


async def test_a_storage_agent_that_fell_silent_is_not_live(world: World) -> None:
    async with cluster(world, "n1", "n2") as (rig, agents):
        world.clock.advance(SETTINGS.silence_limit_s + 0.1)
        await agents["n2"].say()
        assert await want(rig) == Done()
        assert [len(agent.heard) for agent in agents.values()] == [0, 1]


async def test_a_model_registered_a_moment_ago_is_known(world: World) -> None:
    async with cluster(world, "n1") as (rig, agents):
        await world.register(model_spec("new"))
        assert await want(rig, "new") == Done()
        assert len(agents["n1"].heard) == 1


async def test_a_cancel_takes_the_place_of_a_prefetch_that_is_not_answered(world: World) -> None:
    async with cluster(world, "n1") as (rig, agents):
        agents["n1"].reply = None
        await want(rig)
        assert await want(rig, cancel=True) == Done()
        agents["n1"].reply = Done()
        async with asyncio.timeout(10):
            await rig.leader.orders.drain()
        kinds = [type(order) for order in agents["n1"].heard]
        assert kinds[0] is PrefetchModel
        assert set(kinds[1:]) == {CancelPrefetch}


async def test_a_storage_agent_that_does_not_answer_does_not_make_its_worker_unusable(world: World) -> None:
    async with world.worker() as worker, cluster(world, "n1") as (rig, agents):
        agents["n1"].reply = Failed(code="stopping", message="stops", retryable=True)
        assert await want(rig) == Done()
        await rig.demand("a")
        assert len(worker.starts) == 1


async def test_an_agent_that_saw_a_higher_term_ends_this_lead(world: World) -> None:
    async with cluster(world, "n1") as (rig, agents):
        agents["n1"].reply = Failed(code=StaleTerm.code, message="2 was seen")
        await want(rig)
        with pytest.raises(ExceptionGroup) as ended:
            await rig.orders
        assert ended.group_contains(StaleTerm)


async def test_a_leader_that_ends_orders_nothing_more(world: World) -> None:
    async with cluster(world, "n1") as (rig, agents):
        rig.leader.parts()[0].stop_intake()  # type: ignore[misc]
        reply = await want(rig)
        assert isinstance(reply, Failed)
        assert reply.code == "stopping"
        assert agents["n1"].heard == []

"""Nodes that are to be empty: a leader turned by hand, fake workers, and rows in the memory database."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.fake_worker import cpu_slots, model_spec
from tests.unit.scheduler.rig import Rig, World, settle

from stoker_bus.port import ask
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import CommandReply, Done, Failed, WantDrain
from stoker_contracts.events import CloudEvent
from stoker_core.errors import NoNode
from stoker_db.ports import DrainRow


@pytest.fixture
async def world() -> World:
    world = World()
    await world.register(model_spec("a"), model_spec("b"))
    return world


async def drain(rig: Rig, node: str, *, undo: bool = False) -> CommandReply:
    """Ask as a gateway does."""
    want = WantDrain(node=node, undo=undo)
    reply: CommandReply = await ask(rig.bus, subjects.SCHEDULER_DRAIN, want, CommandReply, timeout_s=1)
    return reply


async def events(world: World) -> list[tuple[str, str]]:
    """(type, subject) of the events on nodes, in order."""
    stored = world.broker.connect().follow(subjects.event("node", ">"), since_sequence=1, follow=False)
    found = [decode(CloudEvent, message.data) async for message in stored]
    return [(event.type, event.subject) for event in found]


async def told(rig: Rig) -> None:
    """Publish the events that wait."""
    publishing = asyncio.create_task(rig.leader.drains._events.part().run())
    await settle()
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)


async def test_nothing_new_is_placed_on_a_drained_node_until_it_is_undone(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        assert isinstance(await drain(rig, "n1"), Done)
        await rig.turn()
        assert worker.draining
        await rig.demand("a")
        await rig.pass_time(3)
        assert worker.starts == []
        assert isinstance(await drain(rig, "n1", undo=True), Done)
        await rig.turn()
        assert not worker.draining
        await rig.demand("a")
        assert len(worker.starts) == 1


async def test_idle_instances_of_a_drained_node_end_and_busy_ones_once_their_requests_have(world: World) -> None:
    async with world.worker(devices=cpu_slots(2)) as worker, world.leader() as rig:
        await rig.demand("a", "b")
        [busy], [idle] = worker.live("a"), worker.live("b")
        await worker.set_running(busy, 1)
        await rig.want("a", queued=0)
        await rig.want("b", queued=0)
        await drain(rig, "n1")
        await rig.pass_time(5)
        assert [(s.instance_id, s.only_if_idle) for s in worker.stops] == [(idle, True)]
        assert worker.live() == [busy]
        [row] = await world.database.nodes.drains()
        assert not row.drained
        await worker.set_running(busy, 0)
        await rig.pass_time(1)
        assert worker.live() == []
        [row] = await world.database.nodes.drains()
        assert row.drained


async def test_an_instance_that_became_busy_is_asked_again_once_it_is_idle(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        [instance_id] = worker.live()
        await rig.want("a", queued=0)
        worker.instances[instance_id].running = 1  # the status that says so is still on its way
        await drain(rig, "n1")
        await rig.leader.drains.turn()
        await settle()
        assert worker.live() == [instance_id]
        await worker.set_running(instance_id, 1)
        await rig.pass_time(10)
        assert len(worker.stops) == 1
        await worker.set_running(instance_id, 0)
        await rig.pass_time(1)
        assert worker.live() == []


async def test_a_start_on_a_drained_node_is_given_up_and_goes_elsewhere(world: World) -> None:
    async with world.worker("n1", start_s=60) as first, world.leader() as rig:
        await rig.demand("a")
        assert first.live("a")
        async with world.worker("n2") as second:
            await rig.turn()
            await drain(rig, "n1")
            await rig.turn()
            await rig.demand("a")
            await rig.turn()
            assert first.live() == []
            assert len(second.starts) == 1


async def test_the_next_leader_keeps_a_node_drained(world: World) -> None:
    async with world.worker() as worker:
        async with world.leader() as rig:
            await drain(rig, "n1")
            await rig.turn()
        async with world.leader() as rig:
            await rig.demand("a")
            await rig.pass_time(2)
            assert worker.starts == []
            await drain(rig, "n1", undo=True)
            await rig.turn()
        async with world.leader() as rig:
            await worker.publish()
            await rig.turn()
            await rig.demand("a")
            assert len(worker.starts) == 1


async def test_a_drained_node_that_restarts_is_drained_again_before_anything_is_placed_there(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await drain(rig, "n1")
        await rig.turn()
        await worker.reboot("boot-2")
        assert not worker.draining
        await rig.demand("a")
        await rig.pass_time(1)
        assert worker.draining
        assert [d.boot_id for d in worker.drains] == ["boot-1", "boot-2"]
        assert worker.starts == []


async def test_an_order_to_drain_that_is_lost_is_given_again(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        world.broker.disconnect(worker.bus)
        await drain(rig, "n1")
        await rig.turn()
        assert not worker.draining
        world.broker.reconnect(worker.bus)
        await worker.publish()
        await rig.pass_time(1)
        assert worker.draining


async def test_a_worker_that_ends_is_not_told_to_take_starts_again(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.leaving = True
        await worker.publish()
        await rig.pass_time(2)
        assert worker.drains == []
        await rig.demand("a")
        assert worker.starts == []


async def test_a_node_that_nobody_knows_cannot_be_drained(world: World) -> None:
    async with world.worker(), world.leader() as rig:
        for undo in (False, True):
            reply = await drain(rig, "n9", undo=undo)
            assert isinstance(reply, Failed)
            assert reply.code == NoNode.code
        assert await world.database.nodes.drains() == []


async def test_a_superseded_leader_stores_nothing_and_says_that_another_may_be_asked(world: World) -> None:
    async with world.worker(), world.leader() as rig:
        world.database._state.term += 1
        reply = await drain(rig, "n1")
        assert isinstance(reply, Failed)
        assert (reply.code, reply.retryable) == ("stopping", True)
        assert await world.database.nodes.drains() == []
        assert rig.leader.state.superseded_by == 2


async def test_a_drain_that_is_undone_while_its_end_is_written_stays_undone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go = world.database.nodes.drain, asyncio.Event()

    async def slowly(row: DrainRow) -> None:
        if row.drained:
            await go.wait()
        await write(row)

    monkeypatch.setattr(world.database.nodes, "drain", slowly)
    async with world.worker() as worker, world.leader() as rig:
        await drain(rig, "n1")
        await rig.leader.drains.turn()
        await settle()
        assert worker.draining
        ending = asyncio.create_task(rig.leader.drains.turn())
        undoing = asyncio.create_task(drain(rig, "n1", undo=True))
        await settle()
        assert not ending.done()
        go.set()
        await asyncio.gather(ending, undoing)
        assert await world.database.nodes.drains() == []


async def test_people_are_told_once_that_a_node_drains_and_once_that_it_is_empty(world: World) -> None:
    async with world.worker():
        async with world.leader() as rig:
            await drain(rig, "n1")
            await drain(rig, "n1")
            await rig.pass_time(2)
            await told(rig)
        async with world.leader() as rig:
            await rig.pass_time(2)
            await drain(rig, "n1", undo=True)
            await drain(rig, "n1", undo=True)
            await told(rig)
    kinds = [kind for kind, _ in await events(world)]
    assert kinds == ["stoker.node.draining", "stoker.node.drained", "stoker.node.undrained"]


async def test_a_node_whose_worker_is_silent_is_not_called_drained(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await rig.want("a", queued=0)
        worker.silent = True
        await rig.pass_time(4)
        await drain(rig, "n1")
        await rig.pass_time(2)
        assert await world.database.nodes.drains() == [DrainRow(node="n1", term=1)]

"""A leader with its loops turned by hand, fake workers on the memory bus, and rows in the memory database."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.fake_worker import GIB, cpu_slots, model_spec
from tests.unit.scheduler.rig import SETTINGS, World, settle, states

from stoker_bus.memory import MemoryBus
from stoker_bus.port import Message
from stoker_contracts import subjects
from stoker_contracts.control import Failed
from stoker_contracts.models import InstanceState
from stoker_core.errors import LeadershipLost, StaleTerm
from stoker_db.ports import InstanceRow, NodeRow

READY, STOPPED, FAILED, STARTING = (
    InstanceState.READY,
    InstanceState.STOPPED,
    InstanceState.FAILED,
    InstanceState.STARTING,
)


@pytest.fixture
async def world() -> World:
    world = World()
    await world.register(model_spec("a"), model_spec("b"))
    return world


async def test_demand_starts_one_instance_and_its_row_follows_it_to_ready(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await rig.demand("a")
        assert [(s.model.model_id, s.devices, s.term) for s in worker.starts] == [("a", (0,), 1)]
        await rig.turn()
        [row] = await world.rows()
        assert (row.model_id, row.node, row.boot_id, row.desired, row.actual) == ("a", "n1", "boot-1", READY, READY)
        assert row.phases.start_ms == 100.0


async def test_the_desired_state_is_written_before_the_command_is_sent(world: World) -> None:
    seen: list[tuple[str, list[tuple[str, InstanceState, InstanceState]]]] = []
    spy: MemoryBus = world.broker.connect()

    async def look(message: Message) -> None:
        seen.append((message.subject, states(await world.rows())))

    await spy.subscribe(subjects.worker_start("n1"), look)
    await spy.subscribe(subjects.worker_stop("n1"), look)
    async with world.worker(), world.leader() as rig:
        await rig.demand("a")
        await rig.pass_time(65)
    assert seen == [
        (subjects.worker_start("n1"), [("a", READY, STARTING)]),
        (subjects.worker_stop("n1"), [("a", STOPPED, READY)]),
    ]


async def test_an_instance_stops_after_its_keep_alive_and_starts_again_on_demand(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await rig.pass_time(59)
        assert worker.live("a")
        await rig.pass_time(4)
        assert not worker.live()
        [row] = await world.rows()
        assert (row.desired, row.actual) == (STOPPED, STOPPED)
        assert "idle" in row.reason
        await rig.demand("a")
        await rig.turn()
        assert len(worker.live("a")) == 1
        assert len(worker.starts) == 2


async def test_an_instance_that_became_busy_refuses_to_stop_and_is_desired_again(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await rig.pass_time(59)
        [instance_id] = worker.live()
        world.clock.advance(3)
        await settle()
        worker.instances[instance_id].running = 1  # the status that says so is still on its way
        await rig.leader.decide()
        await settle()
        assert [s.only_if_idle for s in worker.stops] == [True]
        [row] = await world.rows()
        assert (row.desired, row.actual) == (READY, READY)
        await worker.set_running(instance_id, 1)
        await rig.pass_time(70)
        assert worker.live("a")
        assert len(worker.stops) == 1
        await worker.set_running(instance_id, 0)
        await rig.pass_time(65)
        assert not worker.live()


async def test_an_idle_instance_makes_room_for_a_demanded_model(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await rig.want("a", queued=0)
        await rig.pass_time(1)
        await rig.demand("b")
        await rig.turn()
        assert [s.model.model_id for s in worker.starts] == ["a", "b"]
        assert not worker.live("a")
        assert worker.live("b")


async def test_a_failed_start_is_recorded_and_backs_off_before_the_next(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.start_failure = "no such architecture"
        await rig.demand("a")
        await rig.demand("a")
        assert len(worker.starts) == 1
        [row] = await world.rows()
        assert (row.actual, row.reason) == (FAILED, "no such architecture")
        for _ in range(7):
            rig.world.clock.advance(0.25)
            await rig.demand("a")
        assert len(worker.starts) == 1  # 1.75 s later
        for _ in range(2):
            rig.world.clock.advance(0.25)
            await rig.demand("a")
        assert len(worker.starts) == 2


async def test_a_refused_start_is_recorded_with_the_reason_and_backs_off(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.refuse_start = Failed(code="device_busy", message="slot 0 is full", retryable=True)
        await rig.demand("a")
        await rig.demand("a")
        assert len(worker.starts) == 1
        [row] = await world.rows()
        assert (row.actual, row.reason) == (FAILED, "device_busy: slot 0 is full")
        worker.refuse_start = None
        world.clock.advance(2.0)
        await rig.demand("a")
        await rig.turn()
        assert worker.live("a")


async def test_success_forgets_earlier_failures(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.start_failure = "unlucky"
        await rig.demand("a")
        worker.start_failure = ""
        world.clock.advance(2.0)
        await rig.demand("a")
        await rig.turn()
        assert worker.live("a")
        assert rig.leader.state.failures == {}


async def test_an_unanswered_command_is_repeated_once_and_its_node_left_alone_until_it_speaks(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.deaf = worker.silent = True
        worker.refuse_start = Failed(code="device_busy", message="")  # nobody hears it
        await rig.want("a")
        await rig.leader.decide()
        while rig.leader.orders.in_hand(worker.starts[0].instance_id if worker.starts else "i-2"):
            await rig.leader.decide()
            await settle()
        assert len(worker.starts) == 2
        assert len({s.instance_id for s in worker.starts}) == 1
        await rig.demand("a")
        assert len(worker.starts) == 2
        [row] = await world.rows()
        assert row.actual is FAILED
        assert row.reason.startswith("request_timeout")
        worker.deaf = worker.silent = False
        worker.refuse_start = None
        await worker.publish()
        await rig.demand("a")
        await rig.turn()
        assert len(worker.live("a")) == 1


async def test_commands_to_a_slow_node_do_not_delay_demand_for_another(world: World) -> None:
    async with world.worker("n1") as slow, world.worker("n2") as quick, world.leader() as rig:
        slow.deaf = True
        await rig.want("a", "b")
        await rig.leader.decide()
        await settle()
        assert [s.model.model_id for s in quick.starts] == ["b"]
        assert rig.leader.orders.in_hand(slow.starts[0].instance_id)


async def test_a_start_that_never_shows_gives_its_device_back_when_its_budget_is_over(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.want("a")
        await rig.leader.decide()
        worker.silent = True
        await settle()
        [instance_id] = worker.live()
        del worker.instances[instance_id]
        worker.silent = False
        await worker.publish()
        await rig.pass_time(119)
        assert states(await world.rows()) == [("a", READY, STARTING)]
        await rig.pass_time(2)
        assert states(await world.rows()) == [("a", READY, FAILED)]


async def test_an_instance_that_vanishes_is_recorded_and_new_demand_starts_another(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        [instance_id] = worker.live()
        await rig.want("a", queued=0)
        await worker.lose(instance_id)
        await rig.turn()
        assert states(await world.rows()) == [("a", READY, FAILED)]
        await rig.demand("a")
        await rig.turn()
        assert len(worker.live("a")) == 1


async def test_an_instance_that_its_worker_stopped_is_no_longer_desired(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        [instance_id] = worker.live()
        await rig.want("a", queued=0)
        await worker.set_state(instance_id, STOPPED)
        await rig.turn()
        assert states(await world.rows()) == [("a", STOPPED, STOPPED)]
        assert await world.database.instances.live() == []


async def test_a_node_that_rebooted_lost_its_instances_and_is_used_once_it_knows_the_term(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        worker.term = 0  # its disk was lost too
        await worker.reboot("boot-2")
        await settle()
        await rig.leader.decide()
        await settle()
        assert len(worker.starts) == 1
        await rig.turn()
        await rig.demand("a")
        await rig.turn()
        assert [s.boot_id for s in worker.starts] == ["boot-1", "boot-2"]
        rows = await world.rows()
        assert states(rows) == [("a", READY, FAILED), ("a", READY, READY)]
        assert rows[0].reason == "its node restarted"


async def test_a_start_that_reaches_a_rebooted_node_goes_again_to_its_new_boot(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.silent = True
        await worker.reboot("boot-2")
        await rig.demand("a")
        assert not worker.live()
        assert states(await world.rows()) == [("a", READY, FAILED)]
        worker.silent = False
        await worker.publish()
        await rig.demand("a")
        await rig.turn()
        assert worker.live("a")


async def test_a_new_leader_adopts_what_runs_and_starts_nothing_twice(world: World) -> None:
    async with world.worker() as worker:
        async with world.leader() as rig:
            await rig.demand("a")
        async with world.leader() as rig:
            assert rig.leader.state.term == 2
            assert worker.term == 2
            await rig.demand("a")
            await rig.turn()
            assert len(worker.starts) == 1
            assert states(await world.rows()) == [("a", READY, READY)]
            await rig.pass_time(65)
            assert states(await world.rows()) == [("a", STOPPED, STOPPED)]


async def test_an_instance_that_postgres_does_not_know_is_adopted_if_its_model_exists(world: World) -> None:
    async with world.worker(devices=cpu_slots(2)) as worker:
        await worker.run_instance(model_spec("a"), "found")
        await worker.run_instance(model_spec("z"), "stray", device=1)
        async with world.leader() as rig:
            await rig.turn()
            await rig.demand("a")
            await rig.turn()
            assert worker.starts == []
            assert worker.live() == ["found"]
            assert [s.instance_id for s in worker.stops] == ["stray"]
            assert {(r.instance_id, r.desired, r.actual) for r in await world.rows()} == {
                ("found", READY, READY),
                ("stray", STOPPED, STOPPED),
            }


async def test_rows_of_instances_that_their_node_does_not_have_are_closed(world: World) -> None:
    def row(instance_id: str, desired: InstanceState, boot_id: str) -> InstanceRow:
        return InstanceRow(
            instance_id=instance_id,
            model_id="a",
            node="n1",
            boot_id=boot_id,
            devices=(0,),
            desired=desired,
            actual=READY,
            term=0,
        )

    for old in (row("i1", READY, "boot-1"), row("i2", STOPPED, "boot-1"), row("i3", READY, "boot-0")):
        await world.database.instances.desire(old)
    async with world.worker(), world.leader():
        ends = {r.instance_id: (r.actual, r.reason) for r in await world.rows()}
        assert ends["i1"] == (FAILED, "gone from its node")
        assert ends["i2"][0] is STOPPED
        assert ends["i3"] == (FAILED, "its node restarted")


async def test_a_new_leader_repeats_a_stop_that_the_last_one_desired(world: World) -> None:
    async with world.worker() as worker:
        async with world.leader() as rig:
            await rig.demand("a")
            [instance_id] = worker.live()
            [row] = await world.rows()
        await world.database.instances.desire(
            InstanceRow(
                instance_id=instance_id,
                model_id="a",
                node="n1",
                boot_id="boot-1",
                devices=row.devices,
                desired=STOPPED,
                actual=READY,
                term=row.term,
            )
        )
        async with world.leader():
            await settle()
            assert not worker.live()


async def test_nothing_is_placed_on_a_node_before_it_answered_the_term(world: World) -> None:
    async with world.leader() as rig, world.worker() as worker:
        await settle()
        await rig.want("a")
        await rig.leader.decide()
        await settle()
        assert worker.starts == []
        await rig.turn()
        assert len(worker.starts) == 1


async def test_while_the_leaders_own_link_is_down_no_node_is_declared_silent(world: World) -> None:
    async with world.worker("n1"), world.worker("n2"), world.worker("n3"), world.leader() as rig:
        await rig.pass_time(2)
        world.broker.disconnect(rig.bus)
        await rig.pass_time(20)
        world.broker.reconnect(rig.bus)
        await rig.pass_time(3)
        assert not any(n.silent for n in rig.leader.state.nodes.values())


async def test_a_silent_node_is_declared_so_and_its_model_starts_elsewhere(world: World) -> None:
    async with world.worker("n1") as lost, world.worker("n2") as n2, world.worker("n3") as n3, world.leader() as rig:
        await rig.demand("a")
        assert lost.live("a")
        lost.silent = True
        await rig.pass_time(2.5)
        await rig.demand("a")
        assert not n2.starts
        await rig.pass_time(1.5)
        await rig.demand("a")
        assert [s.model.model_id for s in n2.starts + n3.starts] == ["a"]
        assert rig.leader.state.nodes["n1"].silent
        lost.silent = False
        await rig.pass_time(1)
        assert not rig.leader.state.nodes["n1"].silent


async def test_a_node_known_only_from_postgres_holds_its_model_for_one_limit_only(world: World) -> None:
    await world.database.nodes.register(NodeRow(name="n0", boot_id="x", devices=cpu_slots(1)), replaces=None)
    await world.database.instances.desire(
        InstanceRow(
            instance_id="i0", model_id="a", node="n0", boot_id="x", devices=(0,), desired=READY, actual=READY, term=0
        )
    )
    async with world.worker() as worker, world.leader() as rig:
        await rig.pass_time(2)
        await rig.demand("a")
        assert worker.starts == []
        await rig.pass_time(1.5)
        await rig.demand("a")
        assert len(worker.starts) == 1


async def test_a_superseded_leader_can_neither_write_nor_command_and_ends(world: World) -> None:
    async with world.worker() as worker, world.leader() as old:
        old.leadership.break_connection()
        async with world.leader() as new:
            assert new.leader.state.term == 2
            await old.want("a")
            old.leader.state.superseded_by = None  # as if it had not heard the worker's status
            await old.leader.decide()
            await settle()
            assert worker.starts == []
            assert old.orders.done()
            assert old.orders.exception() is not None
            assert old.orders.exception().subgroup(StaleTerm)  # type: ignore[union-attr]
            with pytest.raises(LeadershipLost):
                await old.leader.check()


async def test_a_leader_that_sees_a_higher_term_decides_nothing_more_and_ends(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        worker.term = 7
        await worker.publish()
        await rig.want("a")
        await rig.leader.decide()
        await settle()
        assert worker.starts == []
        with pytest.raises(LeadershipLost):
            await rig.leader.check()


async def test_a_worker_that_remembers_a_higher_term_refuses_the_leader(world: World) -> None:
    async with world.worker() as worker:
        worker.silent, worker.term = True, 7
        await world.database.nodes.register(NodeRow(name="n1", boot_id="boot-1"), replaces=None)
        with pytest.raises(ExceptionGroup) as refused:
            async with world.leader():
                pass
        assert refused.group_contains(StaleTerm)


async def test_demand_for_a_model_registered_just_now_starts_it(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await world.register(model_spec("new"))
        await rig.want("new")
        assert rig.leader.wakes.models.is_set()
        await rig.turn()
        assert len(worker.starts) == 1


async def test_instances_of_a_deleted_model_stop(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("a")
        await world.database.models.delete("a")
        await rig.turn()
        await rig.turn()
        assert not worker.live()
        assert states(await world.rows()) == [("a", STOPPED, STOPPED)]


async def test_a_start_without_a_database_is_not_commanded(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.want("a")
        world.database.go_down()
        await rig.leader.decide()
        await settle()
        assert worker.starts == []
        with pytest.raises(LeadershipLost):
            await rig.leader.check()


async def test_nodes_prepare_each_architecture_once_and_again_only_after_a_minute(world: World) -> None:
    async with world.worker() as worker:
        worker.prepared = ()
        async with world.leader() as rig:
            await rig.pass_time(55)
            assert [p.model.architecture for p in worker.prepares] == ["LlamaForCausalLM"]
            await rig.pass_time(10)
            assert len(worker.prepares) == 2
            worker.prepared = ("LlamaForCausalLM",)
            await rig.pass_time(65)
            assert len(worker.prepares) == 2


async def test_a_model_that_fits_nowhere_starts_nothing(world: World) -> None:
    await world.register(model_spec("huge", weight_bytes=64 * GIB))
    async with world.worker() as worker, world.leader() as rig:
        await rig.demand("huge", "a")
        assert [s.model.model_id for s in worker.starts] == ["a"]


async def test_a_leader_that_is_cut_off_from_the_bus_for_long_gives_the_lead_up(world: World) -> None:
    async with world.leader() as rig:
        world.broker.disconnect(rig.bus)
        world.clock.advance(9)
        await rig.leader.check()
        world.clock.advance(2)
        with pytest.raises(LeadershipLost):
            await rig.leader.check()


async def test_models_of_most_nodes_that_died_at_once_start_again_on_the_one_that_speaks(world: World) -> None:
    async with (
        world.worker("n1") as first,
        world.worker("n2") as second,
        world.worker("n3") as third,
        world.leader() as rig,
    ):
        await rig.demand("a")
        [where] = [w for w in (first, second, third) if w.starts]
        speaks = next(w for w in (third, second) if w is not where)
        for worker in (first, second, third):
            worker.silent = worker.deaf = worker is not speaks
        for _ in range(14):
            await rig.want("a")
            await rig.pass_time(1)
        assert speaks.starts == [], "it may still be this link"
        for _ in range(4):
            await rig.want("a")
            await rig.pass_time(1)
        assert len(speaks.live("a")) == 1


async def test_a_start_that_waited_past_its_budget_is_not_commanded(world: World) -> None:
    async with world.worker() as worker, world.leader() as rig:
        await rig.want("a")
        rig.orders.cancel()  # nobody carries orders out
        await asyncio.gather(rig.orders, return_exceptions=True)
        await rig.leader.decide()
        world.clock.advance(SETTINGS.start_budget_s + 1)
        await rig.leader.decide()
        await rig.leader.reconcile()
        late = asyncio.create_task(rig.leader.orders.run())
        await settle()
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert worker.starts == []
        assert await world.rows() == []

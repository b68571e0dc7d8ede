"""What is kept of decisions and of what came of them: a leader turned by hand on the memory bus and database."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
from tests.support.fake_worker import FakeWorker, model_spec
from tests.unit.scheduler.rig import Rig, World

from stoker_contracts.control import Failed
from stoker_contracts.decisions import OPTIONS_MAX, DecisionRecord
from stoker_contracts.models import InstanceState, Tier
from stoker_db.ports import InstanceRow
from stoker_policy.commands import Decision, Option
from stoker_policy.startup import Stage, Startup
from stoker_scheduler import explain

LOAD_S, ENGINE_S = 0.02, 0.08  # what fake workers take is 20 ms and 80 ms


def option(node: str = "n1", *, load_s: float = LOAD_S, how: str = "free") -> Option:
    return Option(
        node=node,
        devices=(0,),
        source=Tier.PEER,
        origin="n9",
        how=how,  # type: ignore[arg-type]
        startup=Startup(
            queue_s=0.0,
            room_s=0.0,
            load_s=load_s,
            engine_s=ENGINE_S,
            spread=0.1,
            stages=(Stage(name="peer:n9", size_bytes=7, seconds=load_s),),
        ),
    )


def decision(
    *options: Option, model_id: str = "a", chosen: int | None = 0, weighed: int = 0, reason: str = "the quickest"
) -> Decision:
    return Decision(
        model_id=model_id,
        options=options,
        weighed=weighed or len(options),
        chosen=chosen,
        commands=(),
        reason=reason,
    )


@pytest.fixture
async def world() -> World:
    world = World()
    await world.register(model_spec("a"), model_spec("b"))
    return world


@pytest.fixture
async def worker(world: World) -> AsyncIterator[FakeWorker]:
    async with world.worker() as worker:
        yield worker


@pytest.fixture
async def rig(world: World, worker: FakeWorker) -> AsyncIterator[Rig]:
    async with world.leader() as rig:
        await worker.publish()
        await rig.turn()
        yield rig


async def begin(rig: Rig, decided: Decision, instance_id: str = "i1") -> None:
    """A start of model a on n1 was decided."""
    state = rig.leader.state
    row = InstanceRow(
        instance_id=instance_id,
        model_id="a",
        node="n1",
        boot_id="boot-1",
        devices=(0,),
        desired=InstanceState.READY,
        actual=InstanceState.STARTING,
        term=state.term,
    )
    await rig.world.database.instances.desire(row)
    state.load(list(state.models.values()), [], [row])
    rig.leader.explanations.decided(decided, "a", instance_id=instance_id)


async def kept(rig: Rig, model_id: str = "a") -> list[DecisionRecord]:
    """Newest first."""
    await rig.leader.explanations.write()
    return await rig.world.database.decisions.of_model(model_id)


async def test_a_decision_is_kept_with_its_best_options_and_how_many_there_were(rig: Rig) -> None:
    options = [option(f"n{n}", load_s=n + 1.0) for n in range(12)]
    await begin(rig, decision(*options, weighed=40, chosen=2))
    [record] = await kept(rig)
    assert (record.term, record.instance_id, record.weighed, record.reason) == (1, "i1", 40, "the quickest")
    assert [o.node for o in record.options] == [f"n{n}" for n in range(OPTIONS_MAX)]
    assert record.option is not None
    assert (record.option.node, record.option.source, record.option.origin) == ("n2", Tier.PEER, "n9")
    startup = record.option.startup
    assert (startup.load_s, startup.engine_s, startup.total_s) == (3.0, ENGINE_S, 3.0 + ENGINE_S)
    assert [(s.name, s.size_bytes, s.seconds) for s in startup.stages] == [("peer:n9", 7, 3.0)]
    assert record.outcome is None


async def test_what_happened_is_stored_beside_what_was_predicted(rig: Rig, worker: FakeWorker) -> None:
    await begin(rig, decision(option()))
    rig.world.clock.advance(2.0)
    await worker.run_instance(model_spec("a"), "i1")
    worker.instances["i1"].phases = explain.StartPhases(
        fork_ms=10, lease_ms=500, load_ms=1000, engine_ms=480, announce_ms=10
    )
    worker.instances["i1"].ordered_s = 0.0
    await worker.publish()
    rig.world.clock.advance(1.0)  # what is found out later changes nothing
    await rig.turn()
    [record] = await kept(rig)
    outcome = record.outcome
    assert outcome is not None
    assert (outcome.load_s, outcome.engine_s, outcome.total_s, outcome.queue_s) == (1.5, 0.5, 2.0, 0.0)
    assert outcome.failure == ""
    assert record.error == pytest.approx((2.0 - 0.1) / 2.0)
    assert record.load_error == pytest.approx((1.5 - LOAD_S) / 1.5)


async def test_time_between_the_decision_and_the_order_counts_as_such(rig: Rig, worker: FakeWorker) -> None:
    await begin(rig, decision(option()))
    rig.world.clock.advance(3.0)
    await worker.run_instance(model_spec("a"), "i1")
    worker.instances["i1"].phases = explain.StartPhases(engine_ms=1000)
    await worker.publish()
    await rig.turn()
    [record] = await kept(rig)
    assert record.outcome is not None
    assert (record.outcome.queue_s, record.outcome.total_s) == (2.0, 3.0)


async def test_a_start_that_fails_is_kept_with_its_reason_and_has_no_error(rig: Rig, worker: FakeWorker) -> None:
    await begin(rig, decision(option()))
    await worker.run_instance(model_spec("a"), "i1")
    await worker.set_state("i1", InstanceState.FAILED, failure="no such architecture")
    await rig.turn()
    [record] = await kept(rig)
    assert record.outcome is not None
    assert record.outcome.failure == "no such architecture"
    assert record.error is None


async def test_a_start_that_its_worker_refuses_is_concluded_too(rig: Rig, worker: FakeWorker) -> None:
    worker.refuse_start = Failed(code="device_busy", message="full", retryable=True)
    await rig.want("a")
    await rig.leader.decide()
    [instance_id] = rig.leader.state.instances
    rig.leader.explanations.decided(decision(option()), "a", instance_id=instance_id)
    await rig.turn()
    record = await rig.world.database.decisions.of_instance(instance_id)
    assert record is not None
    assert record.outcome is not None
    assert record.outcome.failure == "device_busy: full"


async def test_an_instance_that_dies_after_it_was_ready_keeps_the_outcome_of_its_start(
    rig: Rig, worker: FakeWorker
) -> None:
    await begin(rig, decision(option()))
    await worker.run_instance(model_spec("a"), "i1")
    await rig.turn()
    [before] = await kept(rig)
    await worker.set_state("i1", InstanceState.FAILED, failure="out of memory")
    await rig.turn()
    assert await kept(rig) == [before]
    assert before.outcome is not None
    assert before.outcome.failure == ""


async def test_the_next_leader_concludes_what_the_last_one_started(world: World, worker: FakeWorker) -> None:
    async with world.leader() as rig:
        await begin(rig, decision(option()))
        await rig.leader.explanations.write()
    async with world.leader() as rig:
        await worker.run_instance(model_spec("a"), "i1")
        await rig.turn()
        [record] = await kept(rig)
        assert record.term == 1
        assert record.outcome is not None
        assert record.outcome.queue_s is None


async def test_while_a_model_waits_only_what_changes_is_kept(rig: Rig) -> None:
    explanations = rig.leader.explanations
    for said in (
        decision(option(how="stop"), reason="idle for 1000 ms"),
        decision(option(how="stop"), reason="idle for 1250 ms"),
        decision(option(how="wait")),  # news, but too soon after the last
    ):
        explanations.decided(said, "a")
    assert [r.reason for r in await kept(rig)] == ["idle for 1000 ms"]
    rig.world.clock.advance(explain.REPEAT_S)
    explanations.decided(decision(option(how="wait")), "a")
    explanations.decided(decision(chosen=None, model_id="b", reason="it fits nowhere"), "b")
    assert [r.option.how if r.option else "" for r in await kept(rig)] == ["wait", "stop"]
    assert [(r.chosen, r.reason) for r in await kept(rig, "b")] == [(None, "it fits nowhere")]


async def test_a_start_is_always_kept(rig: Rig) -> None:
    for number in range(3):
        rig.leader.explanations.decided(decision(option()), "a", instance_id=f"i{number}")
    assert len(await kept(rig)) == 3


async def test_a_prediction_without_end_can_be_kept_and_read(rig: Rig) -> None:
    await begin(rig, decision(option(load_s=math.inf)))
    [record] = await kept(rig)
    assert record.option is not None
    assert record.option.startup.load_s == explain.FOREVER_S


async def test_while_the_database_is_away_nothing_is_lost_within_the_bound_and_no_decision_waits(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "WAITING_MAX", 3)
    rig.world.database.go_down()
    for number in range(5):
        rig.leader.explanations.decided(decision(option(f"n{number}")), "a", instance_id=f"i{number}")
    await rig.leader.explanations.drain()
    rig.world.database.come_up()
    assert {r.instance_id for r in await kept(rig)} == {"i4", "i3", "i2"}


async def test_old_decisions_are_forgotten_with_the_instances_of_their_time(rig: Rig) -> None:
    rig.leader.explanations.decided(decision(option()), "a", instance_id="i1")
    assert len(await kept(rig)) == 1
    rig.world.clock.advance(7 * 24 * 3600)
    await rig.leader.prune()
    assert await kept(rig) == []

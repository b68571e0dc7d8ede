"""Where a model starts, one rule at a time."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.support.fake_worker import GIB, model_spec
from tests.unit.policy.clusters import Facts, demand, instance, node

from stoker_contracts.models import InstanceState, ModelSpec, Tier
from stoker_policy import Cluster, Decision, HeldView, LoadView, Migrate, Option, Reserved, Start, Stop, place

A, B, C = (model_spec(name) for name in "abc")
STARTING = InstanceState.STARTING


def held(node: str, model: ModelSpec = A, *, dram: bool = False) -> HeldView:
    return HeldView(
        node=node,
        model_id=model.model_id,
        dram_bytes=model.weight_bytes if dram else 0,
        ssd_bytes=0 if dram else model.weight_bytes,
    )


def chosen(decision: Decision) -> Option:
    assert decision.chosen is not None
    return decision.options[decision.chosen]


def start(decision: Decision) -> Start:
    [command] = decision.commands
    assert isinstance(command, Start)
    return command


def test_a_model_starts_where_it_lies_in_the_fastest_tier() -> None:
    facts = Facts(nodes=tuple(map(node, ("n1", "n2", "n3"))), models=(A,), held=(held("n2"), held("n3", dram=True)))
    decision = place(facts.cluster(), A)
    assert (start(decision).node, chosen(decision).source) == ("n3", Tier.DRAM)
    # Who has it in memory is so much sooner that all the others are weighed, and come after it in the order of their tiers.
    assert [option.source for option in decision.options] == [Tier.DRAM, Tier.SSD, Tier.PEER]


def test_a_peer_gives_what_the_model_s_own_source_gives_more_slowly() -> None:
    facts = Facts(nodes=(node("n1"), node("n2")), models=(A, B), held=(held("n2"),))
    cluster = facts.cluster()
    for number in range(2):  # n2 is full of work that nobody moves
        cluster.put_instance(instance(f"i{number}", "b", node="n2", running=1, gpu_bytes=GIB, generated_tokens=0))
    command = start(place(cluster, A))
    assert (command.node, command.option.source, command.option.origin, command.sources) == (
        "n1",
        Tier.PEER,
        "n2",
        ("n2",),
    )


def test_who_holds_it_nowhere_takes_it_from_its_own_source() -> None:
    option = chosen(place(Facts(nodes=(node(),), models=(A,)).cluster(), A))
    assert (option.source, option.origin, option.how) == (Tier.REMOTE, "file", "free")


def test_a_slow_node_loses_to_a_fast_one_however_they_are_called() -> None:
    cluster = Facts(nodes=(node("n1"), node("n2")), models=(A,), held=(held("n1"), held("n2"))).cluster()
    cluster.estimates.observe_tier("n1", Tier.SSD, 0.1e9)
    cluster.estimates.observe_tier("n2", Tier.SSD, 9e9)
    assert start(place(cluster, A)).node == "n2"


def test_loads_ahead_on_the_same_way_send_a_start_elsewhere() -> None:
    cluster = Facts(nodes=(node("n1", slots=2), node("n2", slots=2)), models=(A, B)).cluster()
    load = LoadView(source=Tier.REMOTE, origin="file", size_bytes=50 * GIB, wait_s=0, load_s=100)
    cluster.put_instance(instance("i1", "b", state=STARTING, load=load, devices=(1,)))
    decision = place(cluster, A)
    assert start(decision).node == "n2"


def test_a_load_ahead_gets_less_with_time() -> None:
    cluster = Facts(nodes=(node("n1", slots=2),), models=(A, B)).cluster()
    load = LoadView(source=Tier.REMOTE, origin="file", size_bytes=50 * GIB, wait_s=0, load_s=100)
    cluster.put_instance(instance("i1", "b", state=STARTING, load=load, devices=(1,)))
    queues = []
    for now_ms in (0, 50_000, 100_000):
        cluster.now_ms = now_ms
        queues.append(chosen(place(cluster, A)).startup.queue_s)
    assert queues[1] == pytest.approx(queues[0] / 2)
    assert queues[2] == 0


def test_decisions_of_one_moment_know_of_one_another() -> None:
    cluster = Facts(nodes=(node("n1"), node("n2")), models=(A, B, C), held=(held("n1"), held("n1", B))).cluster()
    reserved = Reserved()
    taken = [start(place(cluster, model, reserved)) for model in (A, B)]
    assert {(s.node, s.devices) for s in taken} == {("n1", (0,)), ("n2", (0,))}
    assert place(cluster, C, reserved).commands == ()


def test_a_load_decided_at_the_same_moment_is_ahead() -> None:
    cluster = Facts(nodes=(node("n1", slots=2),), models=(A, B)).cluster()
    reserved = Reserved()
    first, second = (chosen(place(cluster, model, reserved)).startup for model in (A, B))
    assert first.queue_s == 0
    assert second.queue_s == pytest.approx(first.load_s, rel=0.2)


def test_an_idle_instance_is_stopped_where_the_model_lies_rather_than_loading_it_from_afar() -> None:
    big = model_spec("big", weight_bytes=20 * GIB)
    nodes = tuple(node(name, memory_bytes=32 * GIB) for name in ("n1", "n2"))
    cluster = Facts(
        nodes=nodes,
        models=(big, B),
        held=(held("n2", big, dram=True),),
        instances=(instance("i1", "b", node="n2", idle_ms=10, gpu_bytes=20 * GIB),),
    ).cluster()
    decision = place(cluster, big)
    assert chosen(decision).how == "stop"
    assert decision.commands == (
        Stop(instance_id="i1", reason="idle for 10 ms, makes room for big", only_if_idle=True),
    )
    cluster.put_instance(instance("i1", "b", node="n2", gpu_bytes=20 * GIB, stop_asked_ms=0, stops=1))
    assert (chosen(place(cluster, big)).how, place(cluster, big).commands) == ("wait", ())
    cluster.drop_instance("i1")
    assert start(place(cluster, big)).node == "n2"


def test_nobody_waits_for_work_in_hand_longer_than_another_start_would_take() -> None:
    big = model_spec("big", weight_bytes=20 * GIB)
    busy = instance("i1", "b", node="n2", running=1, gpu_bytes=20 * GIB, generated_tokens=190, token_s=0.001)
    cluster = Facts(
        nodes=tuple(node(name, memory_bytes=32 * GIB) for name in ("n1", "n2")),
        models=(big, B),
        held=(held("n2", big, dram=True),),
        instances=(busy,),
    ).cluster()
    cluster.put_demand(demand("big", 1, 0))
    assert (chosen(place(cluster, big)).how, place(cluster, big).commands) == ("wait", ())
    cluster.now_ms = 60_000
    assert start(place(cluster, big)).node == "n1"


class TestTensorParallel:
    split = model_spec("s", weight_bytes=4 * GIB, tensor_parallel=2)  # 2.475 GiB on each

    def test_it_takes_devices_of_one_node_and_each_holds_its_part(self) -> None:
        nodes = (node("n1", memory_bytes=3 * GIB), node("n2", slots=3, memory_bytes=3 * GIB))
        facts = Facts(nodes=nodes, models=(self.split, A), instances=(instance("i1", "a", node="n2", devices=(1,)),))
        command = start(place(facts.cluster(), self.split))
        assert (command.node, command.devices) == ("n2", (0, 2))

    def test_it_is_refused_where_no_node_has_so_many_devices_that_are_large_enough(self) -> None:
        facts = Facts(nodes=(node("n1", memory_bytes=3 * GIB), node("n2", slots=2, memory_bytes=2 * GIB)))
        decision = place(facts.cluster(), self.split)
        assert decision.chosen is None
        assert str(self.split.gpu_bytes) in decision.reason
        assert "2 devices of one node" in decision.reason

    def test_one_that_is_stopped_frees_all_its_devices(self) -> None:
        idle = instance("i1", "b", devices=(0, 1), idle_ms=5, gpu_bytes=2 * GIB)
        facts = Facts(nodes=(node(slots=2, memory_bytes=3 * GIB),), models=(self.split, B), instances=(idle,))
        decision = place(facts.cluster(), self.split)
        assert [c.instance_id for c in decision.commands if isinstance(c, Stop)] == ["i1"]
        assert chosen(decision).displaced == 1


class TestMigration:
    big = model_spec("big", weight_bytes=20 * GIB)

    def crowded(self, **fields: object) -> Cluster:
        """The model lies on n1, whose device is busy; n2 has no room for it, but for who is busy."""
        busy = {"running": 1, "running_tokens": 100, "generated_tokens": 0, "token_s": 1.0}
        cluster = Facts(
            nodes=(node("n1", memory_bytes=24 * GIB), node("n2", memory_bytes=4 * GIB)),
            models=(self.big, A, B),
            held=(held("n1", self.big, dram=True), held("n2", A, dram=True)),
            instances=(instance("i1", "a", **(busy | fields)),),  # type: ignore[arg-type]
        ).cluster(migrates=True)
        cluster.estimates.observe_migration("n2", 100, 0.2)
        return cluster

    def test_who_is_busy_moves_to_where_it_can_be_started(self) -> None:
        decision = place(self.crowded(), self.big)
        [command] = decision.commands
        assert isinstance(command, Migrate)
        assert (command.instance_id, command.node, command.devices, command.to_instance) == ("i1", "n2", (0,), "")
        assert chosen(decision).how == "migrate"

    def test_a_ready_instance_of_the_same_model_takes_it_over(self) -> None:
        cluster = self.crowded()
        cluster.put_instance(instance("i2", "a", node="n2", running=1))
        [command] = place(cluster, self.big).commands
        assert isinstance(command, Migrate)
        assert command.to_instance == "i2"

    def test_one_without_slots_left_does_not(self) -> None:
        cluster = self.crowded()
        cluster.put_instance(instance("i2", "a", node="n2", running=A.slots))
        [command] = place(cluster, self.big).commands
        assert isinstance(command, Migrate)
        assert command.to_instance == ""

    def test_two_who_move_to_one_instance_have_slots_there_together(self) -> None:
        cluster = self.crowded()
        cluster.put_instance(replace(cluster.instances["i1"], instance_id="i3"))
        cluster.put_instance(instance("i2", "a", node="n2", running=A.slots - 2))
        moves = [c for c in place(cluster, self.big).commands if isinstance(c, Migrate)]
        assert [m.to_instance for m in moves] == ["i2", "i2"]
        cluster.put_instance(instance("i2", "a", node="n2", running=A.slots - 1))
        moves = [c for c in place(cluster, self.big).commands if isinstance(c, Migrate)]
        assert [m.to_instance for m in moves].count("i2") <= 1

    def test_nobody_moves_who_is_finished_sooner(self) -> None:
        decision = place(self.crowded(token_s=1e-6), self.big)
        assert (chosen(decision).how, decision.commands) == ("wait", ())

    def test_nobody_moves_unless_the_cluster_migrates(self) -> None:
        cluster = self.crowded()
        cluster.migrates = False
        assert place(cluster, self.big).commands == ()

    def test_two_who_move_do_not_go_to_the_same_room(self) -> None:
        cluster = self.crowded()
        cluster.put_instance(replace(cluster.instances["i1"], instance_id="i2", model_id="b"))
        cluster.put_node(node("n2", memory_bytes=2 * GIB))
        assert place(cluster, self.big).commands == ()
        cluster.put_node(node("n2", slots=2, memory_bytes=2 * GIB))
        moves = [c for c in place(cluster, self.big).commands if isinstance(c, Migrate)]
        assert {m.instance_id for m in moves} == {"i1", "i2"}
        assert {m.devices for m in moves} == {(0,), (1,)}


def test_a_model_that_must_keep_an_instance_loses_none_of_those() -> None:
    kept = model_spec("b", min_replicas=1)
    facts = Facts(nodes=(node(),), models=(A, kept), instances=(instance("i1", "b", idle_ms=99),))
    assert place(facts.cluster(), A).commands == ()


def test_at_most_eight_options_are_shown_and_the_chosen_one_is_among_them() -> None:
    facts = Facts(
        nodes=tuple(node(f"n{n}") for n in range(30)), models=(A,), held=tuple(held(f"n{n}") for n in range(20))
    )
    decision = place(facts.cluster(), A)
    assert len(decision.options) <= 8 <= decision.weighed or len(decision.options) == decision.weighed
    assert decision.chosen == 0
    totals = [option.startup.total_s for option in decision.options]
    assert totals == sorted(totals)

"""What must hold of placements and of the index they look things up in, whatever happened before."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.policy.clusters import Facts, clusters

from stoker_contracts.models import EngineKind, InstanceState, ModelSpec
from stoker_policy import Cluster, Decision, HeldView, InstanceView, Migrate, Reserved, Start, decide, place
from stoker_policy.options import RESOLUTION_S

many = settings(max_examples=100, deadline=None)


def used_bytes(cluster: Cluster) -> Counter[tuple[str, int]]:
    """Of every device, by the instances on it."""
    used: Counter[tuple[str, int]] = Counter()
    for instance in cluster.instances.values():
        site = cluster.sites[instance.node]
        for index in set(instance.devices) & site.slots.keys():
            if instance.state not in (InstanceState.STOPPED, InstanceState.FAILED):
                used[(instance.node, index)] += site.slots[index].held_bytes(instance)
    return used


def started(model: ModelSpec, start: Start) -> InstanceView:
    """A start as it shows in the facts once it is put there."""
    return InstanceView(
        instance_id=f"new {model.model_id}",
        model_id=model.model_id,
        node=start.node,
        devices=start.devices,
        state=InstanceState.STARTING,
        gpu_bytes=model.gpu_bytes,
        load=start.load,
    )


def best_s(decision: Decision) -> float | None:
    return None if decision.chosen is None else decision.options[decision.chosen].startup.total_s


@many
@given(clusters())
def test_no_device_is_over_committed_and_no_node_is_used_that_may_not_be(facts: Facts) -> None:
    cluster = facts.cluster(migrates=True)
    used = used_bytes(cluster)
    new = []
    for command in decide(cluster).commands:
        if isinstance(command, Start):
            new.append((command.node, command.devices, cluster.models[command.model_id]))
        elif isinstance(command, Migrate) and not command.to_instance:
            moved = cluster.models[cluster.instances[command.instance_id].model_id]
            new.append((command.node, command.devices, moved))
    for node, devices, model in new:
        site = cluster.sites[node]
        assert site.view is not None
        assert site.view.usable
        assert site.view.zygote_ready or model.engine is not EngineKind.VLLM
        assert len(set(devices)) == len(devices) == model.tensor_parallel
        for index in devices:
            used[(node, index)] += model.bytes_on(site.slots[index].device)
            assert used[(node, index)] <= site.slots[index].device.memory_bytes


@many
@given(clusters(), clusters(), st.randoms(use_true_random=False))
def test_what_a_cluster_was_before_means_nothing(facts: Facts, before: Facts, chance: random.Random) -> None:
    """News one by one, in any order, end in the same decision as everything told at once."""
    cluster = before.cluster(migrates=True)
    decide(cluster)
    news = [
        *((cluster.put_node, view) for view in facts.nodes),
        *((cluster.put_instance, view) for view in facts.instances),
        *((cluster.put_model, view) for view in facts.models),
        *((cluster.put_demand, view) for view in facts.demands),
        *((cluster.put_failure, view) for view in facts.failures),
    ]
    gone = [
        *((cluster.drop_node, name) for name in {n.name for n in before.nodes} - {n.name for n in facts.nodes}),
        *((cluster.drop_instance, view.instance_id) for view in before.instances),
        *(
            (cluster.drop_model, name)
            for name in {m.model_id for m in before.models} - {m.model_id for m in facts.models}
        ),
        *((cluster.drop_demand, view.model_id) for view in before.demands),
        *((cluster.drop_failure, view.model_id) for view in before.failures),
    ]
    chance.shuffle(gone)
    chance.shuffle(news)
    for tell, what in (*gone, *news):
        tell(what)  # type: ignore[operator]
    for name in {view.node for view in (*before.held, *facts.held)}:
        held = {v.model_id: (v.dram_bytes, v.ssd_bytes) for v in facts.held if v.node == name}
        cluster.put_holdings(name, held)
    assert decide(cluster) == decide(facts.cluster(migrates=True))


@many
@given(clusters())
def test_asking_changes_nothing(facts: Facts) -> None:
    cluster = facts.cluster(migrates=True)
    assert decide(cluster) == decide(cluster)


@many
@given(clusters(), st.data())
def test_more_of_a_model_in_a_faster_tier_never_makes_its_start_later(facts: Facts, data: st.DataObject) -> None:
    cluster = facts.cluster()
    model = data.draw(st.sampled_from(facts.models))
    before = best_s(place(cluster, model))
    if not facts.nodes or before is None:
        return
    node = data.draw(st.sampled_from(facts.nodes)).name
    dram_bytes, _ = cluster.sites[node].model_bytes.get(model.model_id, (0, 0))
    in_dram = data.draw(st.booleans())
    cluster.put_held(node, model.model_id, model.weight_bytes if in_dram else dram_bytes, model.weight_bytes)
    after = best_s(place(cluster, model))
    assert after is not None
    assert after <= before + RESOLUTION_S


@many
@given(clusters(), st.data())
def test_a_reservation_counts_as_what_it_becomes(facts: Facts, data: st.DataObject) -> None:
    """The second of two decisions of one moment is the same as if the first one's start showed already."""
    first, second = data.draw(st.lists(st.sampled_from(facts.models), min_size=2, max_size=2))
    cluster, reserved = facts.cluster(), Reserved()
    commands = place(cluster, first, reserved).commands
    if not commands or not isinstance(commands[0], Start) or first == second:
        return
    at_once = place(cluster, second, reserved)
    cluster.put_instance(started(first, commands[0]))
    assert at_once.commands == place(cluster, second).commands or _reasons_apart(at_once, place(cluster, second))


def _reasons_apart(one: Decision, other: Decision) -> bool:
    """A reason says how much was free, which differs; nothing else does."""

    def plain(decision: Decision) -> list[object]:
        return [replace(c, reason="") if isinstance(c, Start) else c for c in decision.commands]

    return plain(one) == plain(other)


@many
@given(clusters(), st.integers(0, 100_000))
def test_time_alone_neither_starts_twice_nor_breaks_the_index(facts: Facts, later_ms: int) -> None:
    cluster = facts.cluster(migrates=True)
    cluster.now_ms = later_ms
    aged = replace(
        facts,
        instances=tuple(
            replace(
                i,
                age_ms=i.age_ms + later_ms,
                idle_ms=i.idle_ms + later_ms if i.idle else i.idle_ms,
                stop_asked_ms=None if i.stop_asked_ms is None else i.stop_asked_ms + later_ms,
            )
            for i in facts.instances
        ),
        demands=tuple(replace(d, oldest_wait_ms=d.oldest_wait_ms + later_ms) for d in facts.demands),
        failures=tuple(replace(f, since_ms=f.since_ms + later_ms) for f in facts.failures),
    )
    assert decide(cluster) == decide(aged.cluster(migrates=True))


def test_a_node_of_which_nothing_is_known_any_more_is_forgotten() -> None:
    cluster = Facts(held=(HeldView(node="n1", model_id="a", ssd_bytes=1),)).cluster()
    assert set(cluster.sites) == {"n1"}
    cluster.put_held("n1", "a", 0, 0)
    assert (cluster.sites, cluster.holders) == ({}, {})

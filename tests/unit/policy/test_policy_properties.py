"""What must hold of every decision, whatever the cluster looks like."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.policy.clusters import Facts, clusters, decide

from stoker_contracts.models import Device, DeviceKind, EngineKind, InstanceState
from stoker_policy import InstanceView, Prepare, Reject, Start, Stop

many = settings(max_examples=100, deadline=None)


def _used_bytes(cluster: Facts, node: str, device: Device) -> int:
    return sum(
        device.memory_bytes if i.gpu_bytes is None or device.kind is DeviceKind.CPU else i.gpu_bytes
        for i in cluster.instances
        if i.node == node and device.index in i.devices and i.state not in (InstanceState.STOPPED, InstanceState.FAILED)
    )


@many
@given(clusters())
def test_starts_never_over_commit_a_device(cluster: Facts) -> None:
    models = {m.model_id: m for m in cluster.models}
    devices = {(n.name, d.index): d for n in cluster.nodes for d in n.devices}
    added: Counter[tuple[str, int]] = Counter()
    for command in decide(cluster):
        if isinstance(command, Start):
            for index in command.devices:
                added[(command.node, index)] += models[command.model_id].bytes_on(devices[(command.node, index)])
    for (node, index), bytes_added in added.items():
        device = devices[(node, index)]
        assert _used_bytes(cluster, node, device) + bytes_added <= device.memory_bytes


@many
@given(clusters())
def test_commands_go_only_to_nodes_that_answered_speak_and_do_not_drain(cluster: Facts) -> None:
    nodes = {n.name: n for n in cluster.nodes}
    engines = {m.model_id: m.engine for m in cluster.models}
    homes = {i.instance_id: i.node for i in cluster.instances}
    for command in decide(cluster):
        if isinstance(command, Reject):
            continue
        node = nodes[homes[command.instance_id] if isinstance(command, Stop) else command.node]
        assert node.answered
        assert not node.silent
        assert not node.draining
        if isinstance(command, Prepare) or (
            isinstance(command, Start) and engines[command.model_id] is EngineKind.VLLM
        ):
            assert node.zygote_ready


@many
@given(clusters())
def test_no_busy_instance_is_stopped_that_was_not_asked_before(cluster: Facts) -> None:
    views = {i.instance_id: i for i in cluster.instances}
    for command in decide(cluster):
        if isinstance(command, Stop):
            view = views[command.instance_id]
            assert view.running == 0 or view.stop_asked_ms is not None
            assert command.only_if_idle or view.state is not InstanceState.READY


@many
@given(clusters(), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_means_nothing(cluster: Facts, chance: random.Random) -> None:
    def shuffled(items: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(chance.sample(items, len(items)))

    fields = ("nodes", "instances", "models", "demands", "failures", "held")
    other = replace(cluster, **{name: shuffled(getattr(cluster, name)) for name in fields})
    assert decide(other) == decide(cluster) == decide(cluster)


@many
@given(clusters())
def test_each_model_is_started_or_rejected_once_at_most_and_only_on_demand(cluster: Facts) -> None:
    answers = Counter(c.model_id for c in decide(cluster) if isinstance(c, Start | Reject))
    assert set(answers.values()) <= {1}
    assert set(answers) <= {d.model_id for d in cluster.demands if d.queued > 0}


@many
@given(clusters())
def test_no_instance_is_stopped_twice_in_one_decision(cluster: Facts) -> None:
    stops = Counter(c.instance_id for c in decide(cluster) if isinstance(c, Stop))
    assert set(stops.values()) <= {1}


@many
@given(clusters())
def test_a_model_that_is_served_by_a_node_in_use_is_not_started_again(cluster: Facts) -> None:
    in_use = {n.name for n in cluster.nodes if not n.silent and not n.draining}
    served = {
        i.model_id
        for i in cluster.instances
        if i.node in in_use and i.stop_asked_ms is None and i.state in (InstanceState.STARTING, InstanceState.READY)
    }
    assert not served & {c.model_id for c in decide(cluster) if isinstance(c, Start)}


@many
@given(clusters())
def test_once_its_commands_are_carried_out_a_decision_orders_nothing_that_it_ordered_before(cluster: Facts) -> None:
    """Carried out at once: starts are reserved, stops are asked. Then the same facts must bring no repeat."""
    commands = decide(cluster)
    needs = {m.model_id: m.gpu_bytes for m in cluster.models}
    asked = {c.instance_id for c in commands if isinstance(c, Stop)}
    views = [replace(i, stop_asked_ms=0, stops=i.stops + 1) if i.instance_id in asked else i for i in cluster.instances]
    views += [
        InstanceView(
            instance_id=f"new {command.model_id}",
            model_id=command.model_id,
            node=command.node,
            devices=command.devices,
            state=InstanceState.STARTING,
            gpu_bytes=needs[command.model_id],
        )
        for command in commands
        if isinstance(command, Start)
    ]
    again = decide(replace(cluster, instances=tuple(views)))
    assert not {c.model_id for c in again if isinstance(c, Start)} & {
        c.model_id for c in commands if isinstance(c, Start)
    }
    assert not asked & {c.instance_id for c in again if isinstance(c, Stop)}

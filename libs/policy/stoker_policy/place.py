"""Where a model starts: on the devices where its first token is expected the soonest."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy

from stoker_contracts.models import Device, InstanceState, ModelSpec
from stoker_policy.candidates import Candidates
from stoker_policy.cluster import Cluster
from stoker_policy.commands import OPTIONS_MAX, Command, Decision, Migrate, Reject, Start
from stoker_policy.facts import InstanceView
from stoker_policy.leave import Destination, Leaving
from stoker_policy.options import Weighed, Weighing
from stoker_policy.reserve import Reserved
from stoker_policy.room import Leaver
from stoker_policy.scale import stop


def place(
    cluster: Cluster, model: ModelSpec, reserved: Reserved | None = None, spared: Collection[str] = ()
) -> Decision:
    """Start an instance of `model`, make room for one, wait for room, or say why it can be nowhere.

    The least estimated startup wins; then what displaces fewest, then the longest idle, the emptiest device, the instances'
    ids, the node, the devices.
    reserved: what was decided at the same moment; what this decides is added.  spared: models whose instances stay.
    """
    reserved = Reserved() if reserved is None else reserved
    impossible = _impossible(cluster, model)
    if impossible:
        command = Reject(model_id=model.model_id, reason=impossible)
        return _decision(model, [], None, (command,), impossible)
    destinations = _Destinations(cluster, reserved)
    leaving = Leaving(cluster, reserved, spared, cluster.wait_ms(model.model_id), destinations.find)
    weighed = Candidates(cluster, model, reserved, Weighing(cluster, model, reserved, leaving.leaver)).weigh()
    for number, one in enumerate(weighed):
        commands = _carry_out(cluster, model, one, reserved)
        if commands is not None:
            return _decision(model, weighed, number, commands, _why(cluster, model, one))
    return _decision(model, weighed, None, (), "no room, and nobody who could make some")


class _Destinations:
    """Where those who run could go on, per model."""

    def __init__(self, cluster: Cluster, reserved: Reserved) -> None:
        self._cluster, self._reserved = cluster, reserved
        self._starts: dict[str, list[Weighed]] = {}

    def find(self, instance: InstanceView) -> Destination | None:
        """At a ready one of its model with slots for all that it has in hand; else where one can be started on free devices."""
        cluster = self._cluster
        model = cluster.models.get(instance.model_id)
        if model is None:
            return None
        ready = [
            other
            for other in cluster.of_model(instance.model_id)
            if other.state is InstanceState.READY
            and not other.leaving
            and other.instance_id != instance.instance_id
            and cluster.sites[other.node].usable
            and other.running + self._reserved.moved[other.instance_id] + instance.running <= model.slots
            and other.instance_id not in self._reserved.leaving
        ]
        if ready:
            best = min(ready, key=lambda other: (other.running, other.instance_id))
            return (0.0, best.instance_id, best.node, best.devices)
        if model.model_id not in self._starts:
            weighing = Weighing(cluster, model, self._reserved, _nobody)
            self._starts[model.model_id] = Candidates(cluster, model, self._reserved, weighing).weigh_room()
        for one in self._starts[model.model_id]:
            option = one.option
            if option.node != instance.node or not set(option.devices) & set(instance.devices):
                return (option.startup.total_s, "", option.node, option.devices)
        return None


def _nobody(_instance: InstanceView, _slot: object) -> None:
    """Makes room for one who moves."""


def _carry_out(cluster: Cluster, model: ModelSpec, one: Weighed, reserved: Reserved) -> tuple[Command, ...] | None:
    """The commands for an option, reserved; None if it turns out that those who should move have nowhere to go together."""
    option, site = one.option, cluster.sites[one.option.node]
    if option.how == "free":
        reason = _why(cluster, model, one)
        start = Start(
            model_id=model.model_id,
            node=option.node,
            devices=option.devices,
            reason=reason,
            option=option,
            load=one.load,
            sources=one.sources,
        )
        reserved.take(site, model, option.devices)
        reserved.start(start)
        return (start,)
    if option.how == "wait":
        # Promised only where it is certain to come: a younger demand must neither use nor count on it.
        if all(leaver.certain for leaver in one.leavers):
            reserved.take(site, model, option.devices)
        return ()
    trial = deepcopy(reserved) if option.how == "migrate" else reserved
    trial.take(site, model, option.devices)
    for leaver in one.leavers:
        trial.leave(leaver)
    commands: list[Command] = []
    for leaver in one.leavers:
        if leaver.how == "stop":
            idle_ms = cluster.idle_ms(leaver.instance)
            commands.append(stop(leaver.instance, f"idle for {idle_ms} ms, makes room for {model.name}"))
        elif leaver.how == "migrate":
            move = _move(cluster, model, leaver, trial)
            if move is None:
                return None
            commands.append(move)
    reserved.adopt(trial)
    return tuple(commands)


def _move(cluster: Cluster, model: ModelSpec, leaver: Leaver, reserved: Reserved) -> Migrate | None:
    """Asked anew: what this decision takes is no destination, nor what others who move take."""
    instance = leaver.instance
    to = _Destinations(cluster, reserved).find(instance)
    if to is None:
        return None
    seconds, to_instance, node, devices = to
    if to_instance:
        reserved.moved[to_instance] += instance.running
    else:
        reserved.take(cluster.sites[node], cluster.models[instance.model_id], devices)
    return Migrate(
        instance_id=instance.instance_id,
        node=node,
        devices=devices,
        reason=f"makes room for {model.name}; its destination is ready in {seconds:.2f} s",
        to_instance=to_instance,
    )


def _why(cluster: Cluster, model: ModelSpec, one: Weighed) -> str:
    option = one.option
    expected = (
        f"first token in {option.startup.total_s:.2f} s, weights from {option.source.value} {option.origin}".rstrip()
    )
    if option.how != "free":
        return f"{expected}, once there is room ({option.how}: {', '.join(one.order[4])})"
    slot = cluster.sites[option.node].slots[option.devices[0]]
    return f"takes {model.bytes_on(slot.device)} bytes, {slot.free_bytes} were free; {expected}"


def _decision(
    model: ModelSpec, weighed: list[Weighed], chosen: int | None, commands: tuple[Command, ...], reason: str
) -> Decision:
    shown = weighed[:OPTIONS_MAX]
    if chosen is not None and chosen >= OPTIONS_MAX:  # what was chosen is always shown
        shown, chosen = [*shown[:-1], weighed[chosen]], OPTIONS_MAX - 1
    return Decision(
        model_id=model.model_id,
        options=tuple(one.option for one in shown),
        weighed=len(weighed),
        chosen=chosen,
        commands=commands,
        reason=reason,
    )


def _impossible(cluster: Cluster, model: ModelSpec) -> str:
    """Why no known node could ever take `model`, or ''. Nodes that are away may come back, so they count."""
    ranks = max(1, model.tensor_parallel)
    devices: list[Device] = []
    for shape in cluster.shapes:
        by_kind: dict[str, int] = {}
        for device in shape:
            if model.bytes_on(device) <= device.memory_bytes:
                by_kind[device.kind] = by_kind.get(device.kind, 0) + 1
        if any(count >= ranks for count in by_kind.values()):
            return ""
        devices += shape
    if not devices:
        return ""
    largest = max(devices, key=lambda d: (d.memory_bytes, -model.bytes_on(d)))
    each = f" on each of {ranks} devices of one node" if ranks > 1 else ""
    return (
        f"needs {model.bytes_on(largest)} bytes{each} ({model.weight_bytes} of weights, {model.kv_cache_bytes} of KV cache, "
        f"and what its engine takes beside them); the largest device has {largest.memory_bytes}"
    )

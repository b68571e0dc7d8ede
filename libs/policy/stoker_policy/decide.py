"""One decision: stop what is no longer wanted, start what is, make room where there is none."""

from __future__ import annotations

from stoker_contracts.models import ModelSpec
from stoker_policy.backoff import backoff_ms
from stoker_policy.cluster import Cluster
from stoker_policy.commands import Command, Reject, Start
from stoker_policy.place import Room, coming, fit, make_room, rooms
from stoker_policy.prepare import prepare
from stoker_policy.scale import stop, surplus


def decide(cluster: Cluster) -> list[Command]:
    """Commands for this state of the cluster; equal clusters, in whatever order, give equal commands.

    Starts and the stops that make room for them come in order of demand: the oldest wait first, ties by model id.
    """
    stops = surplus(cluster)
    commands: list[Command] = [*stops]
    demanded = {d.model_id for d in cluster.demands if d.queued > 0}
    where = rooms(cluster, leaving=(s.instance_id for s in stops), spared=demanded)
    for model in wanting(cluster):
        commands += _serve(model, cluster, where)
    return [*commands, *prepare(cluster)]


def wanting(cluster: Cluster) -> list[ModelSpec]:
    """Demanded models without an instance, whose back-off is over; the longest wait first, ties by model id."""
    models = {m.model_id: m for m in cluster.models}
    gone = {n.name for n in cluster.nodes if n.silent or n.draining}
    known = {n.name for n in cluster.nodes} - gone
    served = {i.model_id for i in cluster.instances if i.live and not i.leaving and i.node in known}
    held = {f.model_id for f in cluster.failures if f.since_ms < backoff_ms(f.in_row)}
    ordered = sorted(cluster.demands, key=lambda d: (-d.oldest_wait_ms, d.model_id))
    return [
        models[d.model_id]
        for d in ordered
        if d.queued > 0 and d.model_id in models and d.model_id not in served and d.model_id not in held
    ]


def _serve(model: ModelSpec, cluster: Cluster, where: list[Room]) -> list[Command]:
    """A start, the stops that make room for one, a rejection, or nothing: wait."""
    impossible = _impossible(model, cluster)
    if impossible:
        return [Reject(model_id=model.model_id, reason=impossible)]
    room = fit(model, where)
    if room is not None:
        need_bytes, free_bytes = model.bytes_on(room.device), room.free_bytes
        room.take(need_bytes)
        reason = f"demand; takes {need_bytes} bytes, {free_bytes} were free"
        return [Start(model_id=model.model_id, node=room.node.name, devices=(room.device.index,), reason=reason)]
    # What is taken here is only claimed: a younger demand must neither use nor count on it.
    room = coming(model, where)
    if room is not None:
        room.take(model.bytes_on(room.device))
        return []
    cleared = make_room(model, where)
    if cleared is None:
        return []
    room, victims = cleared
    for victim in victims:
        room.leave(victim)
    room.take(model.bytes_on(room.device))
    return [stop(v, f"idle for {v.idle_ms} ms, makes room for {model.name}") for v in victims]


def _impossible(model: ModelSpec, cluster: Cluster) -> str:
    """Why no known device could ever take `model`, or ''. Nodes that are away may come back, so they count."""
    devices = [device for node in cluster.nodes for device in node.devices]
    if not devices or any(model.bytes_on(device) <= device.memory_bytes for device in devices):
        return ""
    largest = max(devices, key=lambda d: (d.memory_bytes, -model.bytes_on(d)))
    return (
        f"needs {model.bytes_on(largest)} bytes ({model.weight_bytes} of weights, {model.kv_cache_bytes} of KV cache, "
        f"and what its engine takes beside them); the largest device has {largest.memory_bytes}"
    )

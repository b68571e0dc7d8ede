"""Which instances should end: idle past their keep-alive, of deleted models, or asked to stop and still there."""

from __future__ import annotations

from stoker_contracts.models import InstanceState
from stoker_policy.backoff import backoff_ms
from stoker_policy.cluster import Cluster, InstanceView
from stoker_policy.commands import Stop


def surplus(cluster: Cluster) -> list[Stop]:
    """Stops that need no demand, by instance id. Only on usable nodes: the others cannot be told."""
    usable = {n.name for n in cluster.nodes if n.usable}
    keep_alive_s = {m.model_id: m.keep_alive_s for m in cluster.models}
    demanded = {d.model_id for d in cluster.demands if d.queued > 0}
    stops = []
    for instance in sorted(cluster.instances, key=lambda i: i.instance_id):
        if not instance.live or instance.node not in usable:
            continue
        reason = _reason(instance, keep_alive_s.get(instance.model_id), instance.model_id in demanded)
        if reason:
            stops.append(stop(instance, reason))
    return stops


def stop(instance: InstanceView, reason: str) -> Stop:
    """Only a ready instance can have a request in hand, which must end first."""
    ready = instance.state is InstanceState.READY
    return Stop(instance_id=instance.instance_id, reason=reason, only_if_idle=ready)


def _reason(instance: InstanceView, keep_alive_s: float | None, demanded: bool) -> str:
    if instance.stop_asked_ms is not None:
        late = instance.stop_asked_ms >= backoff_ms(instance.stops)
        return f"asked to stop {instance.stops} times and still there" if late else ""
    if instance.state is InstanceState.STOPPING or instance.running > 0:
        return ""
    if keep_alive_s is None:
        return "its model was deleted"
    if instance.idle and not demanded and instance.idle_ms > keep_alive_s * 1000:
        return f"idle for {instance.idle_ms} ms, kept alive for {keep_alive_s:g} s"
    return ""

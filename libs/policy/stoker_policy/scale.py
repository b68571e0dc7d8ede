"""Which instances should end: idle past their keep-alive, more than the load justifies, of deleted models, or still there."""

from __future__ import annotations

from stoker_contracts.models import InstanceState
from stoker_policy.backoff import backoff_ms
from stoker_policy.cluster import Cluster
from stoker_policy.commands import Stop
from stoker_policy.facts import InstanceView
from stoker_policy.keep import window


def surplus(cluster: Cluster) -> list[Stop]:
    """Stops that need no demand, by instance id. Only on usable nodes: the others cannot be told."""
    stops: dict[str, Stop] = {}
    for instance in cluster.to_review():
        if cluster.sites[instance.node].usable:
            reason = _reason(cluster, instance)
            if reason:
                stops[instance.instance_id] = stop(instance, reason)
    _keep_least(cluster, stops)
    _above(cluster, stops)
    return [stops[instance_id] for instance_id in sorted(stops)]


def stop(instance: InstanceView, reason: str) -> Stop:
    """Only a ready instance can have a request in hand, which must end first."""
    ready = instance.state is InstanceState.READY
    return Stop(instance_id=instance.instance_id, reason=reason, only_if_idle=ready)


def _reason(cluster: Cluster, instance: InstanceView) -> str:
    asked_ms = cluster.stop_asked_ms(instance)
    if asked_ms is not None:
        late = asked_ms >= backoff_ms(instance.stops)
        return f"asked to stop {instance.stops} times and still there" if late else ""
    if instance.state is InstanceState.STOPPING or instance.running > 0:
        return ""
    model = cluster.models.get(instance.model_id)
    if model is None:
        return "its model was deleted"
    if not instance.idle or instance.model_id in cluster.demands:
        return ""
    idle_ms, kept = cluster.idle_ms(instance), window(model, cluster.idle_times)
    if kept.stays(idle_ms / 1000):
        return ""
    text = f"idle for {idle_ms} ms, kept alive for {kept.keep_alive_s:g} s"
    return f"{text}, from {kept.prewarm_s:g} s on" if kept.prewarm_s else text


def _keep_least(cluster: Cluster, stops: dict[str, Stop]) -> None:
    """Idle ones stay where a model would have fewer than it must."""
    for model_id in {cluster.instances[instance_id].model_id for instance_id in stops}:
        model = cluster.models.get(model_id)
        if model is None or model.min_replicas <= 0:
            continue
        serving = cluster.serving(model_id)
        ending = sorted(i.instance_id for i in serving if i.instance_id in stops)
        for instance_id in ending[: max(0, model.min_replicas - (len(serving) - len(ending)))]:
            del stops[instance_id]


def _above(cluster: Cluster, stops: dict[str, Stop]) -> None:
    """Of models that have more instances than their load justifies the longest idle end; the last one is its keep-alive's matter."""
    for model_id, replicas in sorted(cluster.scaling.counts().items()):
        serving = [i for i in cluster.serving(model_id) if i.instance_id not in stops]
        above = len(serving) - max(1, replicas.count)
        if above <= 0:
            continue
        idle = [i for i in serving if i.idle and cluster.sites[i.node].usable]
        for instance in sorted(idle, key=lambda i: (-cluster.idle_ms(i), i.instance_id))[:above]:
            stops[instance.instance_id] = stop(instance, f"more than its load needs: {replicas.reason}")

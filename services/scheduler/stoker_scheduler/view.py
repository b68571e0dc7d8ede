"""The leader's state as the policy sees it: times become ages."""

from __future__ import annotations

from stoker_policy.cluster import Cluster, FailureView, HeldView, InstanceView, NodeView
from stoker_scheduler.records import Node, Tracked
from stoker_scheduler.state import State


def cluster(state: State, now_s: float, *, prepare_again_s: float) -> Cluster:
    """prepare_again_s: how long an architecture asked for counts as being prepared."""
    return Cluster(
        nodes=tuple(_node(n, now_s, prepare_again_s) for n in state.nodes.values()),
        instances=tuple(_instance(t, now_s) for t in state.instances.values() if not t.ended),
        models=tuple(state.models.values()),
        demands=state.demands.views(now_s),
        failures=tuple(
            FailureView(model_id=model_id, in_row=f.in_row, since_ms=_age_ms(f.last_s, now_s))
            for model_id, f in state.failures.items()
        ),
    )


def _node(node: Node, now_s: float, prepare_again_s: float) -> NodeView:
    status = node.status
    return NodeView(
        name=node.name,
        devices=node.devices,
        answered=node.answered,
        silent=node.silent,
        draining=status.draining if status else False,
        zygote_ready=status.zygote_ready if status else False,
        prepared=status.prepared if status else (),
        preparing=tuple(a for a, asked_s in node.prepare_asked_s.items() if now_s - asked_s < prepare_again_s),
        held=tuple(HeldView(model_id=h.model_id, held_bytes=h.held_bytes) for h in node.store.held)
        if node.store
        else (),
    )


def _instance(tracked: Tracked, now_s: float) -> InstanceView:
    row, status, asked_s = tracked.row, tracked.status, tracked.stop_asked_s
    return InstanceView(
        instance_id=row.instance_id,
        model_id=row.model_id,
        node=row.node,
        devices=row.devices,
        state=tracked.state,
        gpu_bytes=tracked.gpu_bytes,
        running=status.running if status else 0,
        idle_ms=status.idle_ms if status else 0,
        stop_asked_ms=None if asked_s is None else _age_ms(asked_s, now_s),
        stops=tracked.stops,
    )


def _age_ms(since_s: float, now_s: float) -> int:
    return round((now_s - since_s) * 1000)

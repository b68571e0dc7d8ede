"""The leader's state as the policy sees it, brought up to date by what changed: times become ages."""

from __future__ import annotations

from stoker_contracts.models import InstanceState, ModelSpec, Tier
from stoker_policy import Cluster, EngineState, FailureView, InstanceView, NodeView
from stoker_scheduler.records import Node, Tracked
from stoker_scheduler.state import State


class Mirror:
    """Keeps a `Cluster` of a `State`. prepare_again_s: how long an architecture asked for counts as being prepared."""

    def __init__(self, state: State, *, prepare_again_s: float) -> None:
        self._state, self._prepare_again_s = state, prepare_again_s
        self._cluster = Cluster(estimates=state.learned.estimates, idle_times=state.learned.idle_times)
        self._preparing: set[str] = set()
        self._store_seen: dict[str, tuple[str, int]] = {}
        state.touched_nodes.update(state.nodes)
        state.touched_instances.update(state.instances)
        state.touched_models.update(state.models)

    def refresh(self, now_s: float) -> Cluster:
        """Everything that changed since the last time."""
        state, cluster = self._state, self._cluster
        cluster.now_ms = round(now_s * 1000)
        for model_id in sorted(state.touched_models):
            if model_id in state.models:
                cluster.put_model(state.models[model_id])
            else:
                cluster.drop_model(model_id)
        for name in sorted(state.touched_nodes | self._preparing):
            self._put_node(state.nodes[name], now_s)
        for instance_id in sorted(state.touched_instances):
            tracked = state.instances.get(instance_id)
            if tracked is None or tracked.ended:
                cluster.drop_instance(instance_id)
            else:
                cluster.put_instance(_instance(tracked, state.nodes.get(tracked.row.node), now_s))
        for touched in (state.touched_models, state.touched_nodes, state.touched_instances):
            touched.clear()
        self._put_wants(now_s)
        return cluster

    def engine_state(self, node: str, model: ModelSpec) -> EngineState:
        """What an engine of `model` would start from there."""
        return self._cluster.sites[node].engine_state(model)

    def _put_node(self, node: Node, now_s: float) -> None:
        view = _node(node, now_s, self._prepare_again_s)
        self._cluster.put_node(view)
        if view.preparing:
            self._preparing.add(node.name)
        else:
            self._preparing.discard(node.name)
        store = node.store
        if store is None or self._store_seen.get(node.name) == (store.boot_id, store.seq):
            return
        self._store_seen[node.name] = (store.boot_id, store.seq)
        held: dict[str, tuple[int, int]] = {}
        for one in store.held:
            dram_bytes, ssd_bytes = held.get(one.model_id, (0, 0))
            # A model's weights are less than its files, by the files' headers: all of these is all of those.
            size_bytes = one.held_bytes
            model = self._state.models.get(one.model_id)
            if model is not None and one.total_bytes and one.held_bytes >= one.total_bytes:
                size_bytes = max(size_bytes, model.weight_bytes)
            if one.tier is Tier.DRAM:
                dram_bytes = size_bytes
            elif one.tier is Tier.SSD:
                ssd_bytes = size_bytes
            held[one.model_id] = (dram_bytes, ssd_bytes)
        self._cluster.put_holdings(node.name, held)

    def _put_wants(self, now_s: float) -> None:
        """Demands and failures: few, and their ages are not the cluster's to keep where gateways repeat them."""
        state, cluster = self._state, self._cluster
        demands = {view.model_id: view for view in state.demands.views(now_s)}
        for model_id in [m for m in cluster.demands if m not in demands]:
            cluster.drop_demand(model_id)
        for demand in demands.values():
            cluster.put_demand(demand)
        for model_id in [m for m in cluster.failures if m not in state.failures]:
            cluster.drop_failure(model_id)
        for model_id, failures in state.failures.items():
            cluster.put_failure(
                FailureView(model_id=model_id, in_row=failures.in_row, since_ms=_age_ms(failures.last_s, now_s))
            )


def cluster(state: State, now_s: float, *, prepare_again_s: float) -> Cluster:
    """All of it, anew."""
    return Mirror(state, prepare_again_s=prepare_again_s).refresh(now_s)


def _node(node: Node, now_s: float, prepare_again_s: float) -> NodeView:
    status = node.status
    return NodeView(
        name=node.name,
        devices=node.devices,
        answered=node.answered,
        silent=node.silent,
        draining=node.draining,
        absurd=bool(node.absurd),
        zygote_ready=status.zygote_ready if status else False,
        prepared=status.prepared if status else (),
        preparing=tuple(a for a, asked_s in node.prepare_asked_s.items() if now_s - asked_s < prepare_again_s),
    )


def _instance(tracked: Tracked, node: Node | None, now_s: float) -> InstanceView:
    row, status, asked_s = tracked.row, tracked.status, tracked.stop_asked_s
    heard_s = node.heard_s if node and node.heard_s is not None else now_s
    return InstanceView(
        instance_id=row.instance_id,
        model_id=row.model_id,
        node=row.node,
        devices=row.devices,
        state=tracked.state,
        gpu_bytes=tracked.gpu_bytes,
        age_ms=0 if tracked.decided_s is None else _age_ms(tracked.decided_s, now_s),
        load=tracked.load if tracked.state is InstanceState.STARTING else None,
        running=status.running if status else 0,
        idle_ms=status.idle_ms + _age_ms(heard_s, now_s) if status and not status.running else 0,
        stop_asked_ms=None if asked_s is None else _age_ms(asked_s, now_s),
        stops=tracked.stops,
    )


def _age_ms(since_s: float, now_s: float) -> int:
    return round((now_s - since_s) * 1000)

"""What the leader knows, and how news change it. No I/O and no clock: every method is told the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from stoker_contracts.control import Demand, InstanceStatus, StoreStatus, WorkerStatus
from stoker_contracts.models import InstanceState, ModelSpec
from stoker_db.ports import DrainRow, InstanceRow, NodeRow
from stoker_policy import Absurd, EngineState, LoadView
from stoker_scheduler.demand import Demands
from stoker_scheduler.learned import Learned
from stoker_scheduler.records import ENDED_STATES, RETIRED_MAX, Node, Tracked

QUARANTINE_S = 60.0
"""A node that reported nonsense is not used before it has been sensible for so long."""


@dataclass
class Failures:
    """Starts of one model that failed in a row."""

    in_row: int = 0
    last_s: float = 0.0


class State:
    """Nodes, instances, models and demand, as the leader of `term` knows them.

    touched_nodes, touched_instances, touched_models: what changed since whoever mirrors it looked last.
    """

    def __init__(self, *, term: int, led_s: float) -> None:
        self.term = term
        self.led_s = led_s
        self.models: dict[str, ModelSpec] = {}
        self.nodes: dict[str, Node] = {}
        self.instances: dict[str, Tracked] = {}
        self.failures: dict[str, Failures] = {}
        self.demands = Demands()
        self.learned = Learned()
        self.superseded_by: int | None = None
        self.touched_nodes: set[str] = set()
        self.touched_instances: set[str] = set()
        self.touched_models: set[str] = set()
        self._on_node: dict[str, set[str]] = {}
        self._reserved: set[str] = set()

    def load(self, models: Sequence[ModelSpec], nodes: Iterable[NodeRow], rows: Iterable[InstanceRow]) -> None:
        """Begin with what Postgres says. What it says of instances holds until their node has answered."""
        self.set_models(models)
        for node_row in nodes:
            self._node(node_row.name).devices = node_row.devices
            self.touched_nodes.add(node_row.name)
        for row in rows:
            self._node(row.node)
            stopping = row.desired is InstanceState.STOPPED
            self._track(
                Tracked(row, self._gpu_bytes(row.model_id), written=True, stop_asked_s=self.led_s if stopping else None)
            )

    def set_models(self, models: Sequence[ModelSpec]) -> bool:
        """Replace the registered models. Returns whether they differ from those known."""
        fresh = {m.model_id: m for m in models}
        if fresh == self.models:
            return False
        known = self.models
        self.touched_models |= {m for m in known.keys() | fresh.keys() if known.get(m) != fresh.get(m)}
        self.models = fresh
        self.learned.forget(fresh)
        self.failures = {model_id: f for model_id, f in self.failures.items() if model_id in fresh}
        # Only filled in: an instance of a model that was deleted still holds what it held.
        for tracked in self.instances.values():
            if tracked.gpu_bytes is None:
                tracked.gpu_bytes = self._gpu_bytes(tracked.row.model_id)
                self.touched_instances.add(tracked.row.instance_id)
        return True

    def apply_demand(self, demand: Demand, now_s: float) -> bool:
        """False: dropped, there are too many."""
        if demand.queued > 0:
            self.learned.busy(demand.model_id, now_s)
        return self.demands.apply(demand, now_s)

    def apply_store(self, status: StoreStatus, now_s: float) -> None:
        """Take what a storage agent says. An older word of the same boot is dropped."""
        node = self._node(status.node)
        if node.store and node.store.boot_id == status.boot_id and status.seq <= node.store.seq:
            return
        try:
            self.learned.store(status)
        except Absurd as absurd:
            self._quarantine(node, absurd, now_s)
            return
        node.store, node.store_heard_s = status, now_s
        self.touched_nodes.add(node.name)

    def live_stores(self, now_s: float, limit_s: float) -> list[StoreStatus]:
        """Of the storage agents that were heard within limit_s, by node."""
        heard = [node for node in self.nodes.values() if node.store and now_s - node.store_heard_s <= limit_s]
        return [node.store for node in sorted(heard, key=lambda node: node.name) if node.store]

    def apply_status(self, status: WorkerStatus, now_s: float) -> bool:
        """Take a node's full list. False: it is older than what is known, and was dropped.

        A term above this leader's sets `superseded_by`.
        """
        node = self._node(status.node)
        known = node.status
        if status.boot_id in node.retired:
            return False
        if known and known.boot_id == status.boot_id and (status.seq, status.term) <= (known.seq, known.term):
            return False
        if known and known.boot_id != status.boot_id:
            node.retired = (*node.retired, known.boot_id)[-RETIRED_MAX:]
            node.prepare_asked_s.clear()
        if status.term > self.term:
            self.superseded_by = status.term
        node.heard_s, node.silent = now_s, False
        node.answered = status.term == self.term
        self.touched_nodes.add(node.name)
        try:
            self.learned.check(status)
        except Absurd as absurd:
            self._quarantine(node, absurd, now_s)
            if known is None or known.boot_id != status.boot_id:
                return True  # nothing that could be believed is known of this boot
            status = replace(known, seq=status.seq, term=status.term)
        node.status = status
        node.devices = status.devices
        self._apply_instances(status, now_s)
        self.learned.seen(status, {d.model_id for d in self.demands.views(now_s)}, now_s)
        return True

    def set_drain(self, name: str, drain: DrainRow | None) -> None:
        """A node is to be empty, or, with None, may be used again."""
        self._node(name).drain = drain
        self.touched_nodes.add(name)

    def fell_silent(self, name: str) -> None:
        """A node is not heard any more: it was marked so."""
        self.touched_nodes.add(name)

    def prepare_asked(self, name: str, architecture: str, now_s: float) -> None:
        self._node(name).prepare_asked_s[architecture] = now_s
        self.touched_nodes.add(name)

    def reserve(
        self,
        row: InstanceRow,
        until_s: float,
        *,
        decided_s: float | None = None,
        load: LoadView | None = None,
        engine: EngineState | None = None,
    ) -> None:
        """A start was decided: its devices are taken from now on. load, engine: what it is expected to load, and start from."""
        bytes_each = self._gpu_bytes(row.model_id)
        tracked = Tracked(row, bytes_each, written=False, reserved_until_s=until_s)
        tracked.decided_s, tracked.load, tracked.engine = decided_s, load, engine
        self._track(tracked)
        self._reserved.add(row.instance_id)

    def start_failed(self, instance_id: str, reason: str, now_s: float, *, counts: bool) -> None:
        """A start came to nothing. counts: because of the model, which must wait before the next one."""
        tracked = self.instances.get(instance_id)
        if tracked is None or tracked.status is not None:
            return  # its worker shows it, and knows better
        tracked.reserved_until_s, tracked.gone = None, reason
        self.touched_instances.add(instance_id)
        if counts:
            self._count_failure(tracked.row.model_id, now_s)

    def stop_asked(self, instance_id: str, now_s: float) -> None:
        tracked = self.instances[instance_id]
        tracked.stop_asked_s, tracked.stops = now_s, tracked.stops + 1
        self.touched_instances.add(instance_id)

    def stop_refused(self, instance_id: str) -> None:
        """It is busy: it is meant to run again."""
        tracked = self.instances.get(instance_id)
        if tracked:
            tracked.stop_asked_s, tracked.stops = None, 0
            self.touched_instances.add(instance_id)

    def desired(self, row: InstanceRow) -> None:
        """Postgres has this desired state now."""
        tracked = self.instances.get(row.instance_id)
        if tracked:
            tracked.row = replace(tracked.row, desired=row.desired, reason=row.reason, term=row.term)
            tracked.written = True
            self.touched_instances.add(row.instance_id)

    def unanswered(self, node: str) -> None:
        """A command got no answer: nothing goes there until the node is heard again."""
        self._node(node).answered = False
        self.touched_nodes.add(node)

    def expire(self, now_s: float) -> None:
        """Let go of demand that was not repeated, of starts that never showed, and of what nodes said that was nonsense long ago."""
        self.demands.expire(now_s)
        for instance_id in sorted(self._reserved):
            tracked = self.instances.get(instance_id)
            if tracked is None or tracked.reserved_until_s is None:
                self._reserved.discard(instance_id)
            elif tracked.reserved_until_s <= now_s:
                self.start_failed(instance_id, "did not show within its start budget", now_s, counts=True)
        for node in self.nodes.values():
            if node.absurd and now_s - node.absurd_s >= QUARANTINE_S:
                node.absurd = ""
                self.touched_nodes.add(node.name)

    def forget(self, instance_id: str) -> None:
        """An instance that ended was recorded so."""
        tracked = self.instances.pop(instance_id, None)
        if tracked:
            self._on_node.get(tracked.row.node, set()).discard(instance_id)
            self.touched_instances.add(instance_id)

    def unannounced(self) -> list[str]:
        """Nodes that should be told the term, by name."""
        return sorted(
            n.name for n in self.nodes.values() if not n.silent and (n.status is None or n.status.term < self.term)
        )

    def _apply_instances(self, status: WorkerStatus, now_s: float) -> None:
        listed = {i.instance_id for i in status.instances}
        for instance_id in sorted(self._on_node.get(status.node, ())):
            tracked = self.instances[instance_id]
            row = tracked.row
            if row.instance_id in listed or tracked.ended:
                continue
            self.touched_instances.add(instance_id)
            if row.boot_id != status.boot_id:
                tracked.gone, tracked.reserved_until_s = "its node restarted", None
            elif tracked.reserved_until_s is None:
                tracked.gone = "gone from its node"
        for instance in status.instances:
            self._apply_instance(status, instance, now_s)

    def _apply_instance(self, status: WorkerStatus, instance: InstanceStatus, now_s: float) -> None:
        tracked = self.instances.get(instance.instance_id)
        if tracked is None:
            if instance.state in ENDED_STATES:
                return  # recorded before; workers list what ended for a while
            tracked = Tracked(self._adopted(status, instance), self._gpu_bytes(instance.model_id), written=False)
            self._track(tracked)
        before = tracked.state
        tracked.status, tracked.reserved_until_s, tracked.gone = instance, None, ""
        self.touched_instances.add(instance.instance_id)
        if instance.state is InstanceState.READY:
            self.failures.pop(instance.model_id, None)
            self._learn_start(status.node, tracked, now_s)
        elif instance.state is InstanceState.FAILED and before is InstanceState.STARTING:
            self._count_failure(instance.model_id, now_s)

    def _learn_start(self, node: str, tracked: Tracked, now_s: float) -> None:
        """Once, of a start that this leader decided."""
        model, status = self.models.get(tracked.row.model_id), tracked.status
        if tracked.engine is None or model is None or status is None:
            return
        engine, tracked.engine = tracked.engine, None
        try:
            self.learned.start(node, model, status, engine, tracked.load)
        except Absurd as absurd:
            self._quarantine(self._node(node), absurd, now_s)

    def _quarantine(self, node: Node, absurd: Absurd, now_s: float) -> None:
        node.absurd, node.absurd_s = str(absurd), now_s
        self.touched_nodes.add(node.name)

    def _adopted(self, status: WorkerStatus, instance: InstanceStatus) -> InstanceRow:
        return InstanceRow(
            instance_id=instance.instance_id,
            model_id=instance.model_id,
            node=status.node,
            boot_id=status.boot_id,
            devices=instance.devices,
            desired=InstanceState.READY,
            actual=instance.state,
            term=self.term,
            reason="found on its node",
        )

    def _count_failure(self, model_id: str, now_s: float) -> None:
        failures = self.failures.setdefault(model_id, Failures())
        failures.in_row, failures.last_s = failures.in_row + 1, now_s

    def _track(self, tracked: Tracked) -> None:
        instance_id, node = tracked.row.instance_id, tracked.row.node
        self.instances[instance_id] = tracked
        self._on_node.setdefault(node, set()).add(instance_id)
        self.touched_instances.add(instance_id)

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            self.nodes[name] = Node(name)
            self.touched_nodes.add(name)
        return self.nodes[name]

    def _gpu_bytes(self, model_id: str) -> int | None:
        model = self.models.get(model_id)
        return model.gpu_bytes if model else None

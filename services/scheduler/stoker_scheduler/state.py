"""What the leader knows, and how news change it. No I/O and no clock: every method is told the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from stoker_contracts.control import Demand, InstanceStatus, StoreStatus, WorkerStatus
from stoker_contracts.models import InstanceState, ModelSpec
from stoker_db.ports import InstanceRow, NodeRow
from stoker_scheduler.demand import Demands
from stoker_scheduler.records import ENDED_STATES, RETIRED_MAX, Node, Tracked


@dataclass
class Failures:
    """Starts of one model that failed in a row."""

    in_row: int = 0
    last_s: float = 0.0


class State:
    """Nodes, instances, models and demand, as the leader of `term` knows them."""

    def __init__(self, *, term: int, led_s: float) -> None:
        self.term = term
        self.led_s = led_s
        self.models: dict[str, ModelSpec] = {}
        self.nodes: dict[str, Node] = {}
        self.instances: dict[str, Tracked] = {}
        self.failures: dict[str, Failures] = {}
        self.demands = Demands()
        self.superseded_by: int | None = None

    def load(self, models: Sequence[ModelSpec], nodes: Iterable[NodeRow], rows: Iterable[InstanceRow]) -> None:
        """Begin with what Postgres says. What it says of instances holds until their node has answered."""
        self.set_models(models)
        for node_row in nodes:
            self._node(node_row.name).devices = node_row.devices
        for row in rows:
            self._node(row.node)
            stopping = row.desired is InstanceState.STOPPED
            self.instances[row.instance_id] = Tracked(
                row, self._gpu_bytes(row.model_id), written=True, stop_asked_s=self.led_s if stopping else None
            )

    def set_models(self, models: Sequence[ModelSpec]) -> bool:
        """Replace the registered models. Returns whether they differ from those known."""
        fresh = {m.model_id: m for m in models}
        changed = fresh != self.models
        self.models = fresh
        self.failures = {model_id: f for model_id, f in self.failures.items() if model_id in fresh}
        # Only filled in: an instance of a model that was deleted still holds what it held.
        for tracked in self.instances.values():
            if tracked.gpu_bytes is None:
                tracked.gpu_bytes = self._gpu_bytes(tracked.row.model_id)
        return changed

    def apply_demand(self, demand: Demand, now_s: float) -> bool:
        """False: dropped, there are too many."""
        return self.demands.apply(demand, now_s)

    def apply_store(self, status: StoreStatus, now_s: float) -> None:
        """Take what a storage agent says. An older word of the same boot is dropped."""
        node = self._node(status.node)
        if node.store and node.store.boot_id == status.boot_id and status.seq <= node.store.seq:
            return
        node.store, node.store_heard_s = status, now_s

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
        node.status, node.heard_s, node.silent = status, now_s, False
        node.answered = status.term == self.term
        node.devices = status.devices
        self._apply_instances(status, now_s)
        return True

    def reserve(self, row: InstanceRow, until_s: float) -> None:
        """A start was decided: its devices are taken from now on."""
        bytes_each = self._gpu_bytes(row.model_id)
        self.instances[row.instance_id] = Tracked(row, bytes_each, written=False, reserved_until_s=until_s)

    def start_failed(self, instance_id: str, reason: str, now_s: float, *, counts: bool) -> None:
        """A start came to nothing. counts: because of the model, which must wait before the next one."""
        tracked = self.instances.get(instance_id)
        if tracked is None or tracked.status is not None:
            return  # its worker shows it, and knows better
        tracked.reserved_until_s, tracked.gone = None, reason
        if counts:
            self._count_failure(tracked.row.model_id, now_s)

    def stop_asked(self, instance_id: str, now_s: float) -> None:
        tracked = self.instances[instance_id]
        tracked.stop_asked_s, tracked.stops = now_s, tracked.stops + 1

    def stop_refused(self, instance_id: str) -> None:
        """It is busy: it is meant to run again."""
        tracked = self.instances.get(instance_id)
        if tracked:
            tracked.stop_asked_s, tracked.stops = None, 0

    def desired(self, row: InstanceRow) -> None:
        """Postgres has this desired state now."""
        tracked = self.instances.get(row.instance_id)
        if tracked:
            tracked.row = replace(tracked.row, desired=row.desired, reason=row.reason, term=row.term)
            tracked.written = True

    def unanswered(self, node: str) -> None:
        """A command got no answer: nothing goes there until the node is heard again."""
        self._node(node).answered = False

    def expire(self, now_s: float) -> None:
        """Let go of demand that was not repeated and of starts that never showed."""
        self.demands.expire(now_s)
        for instance_id, tracked in self.instances.items():
            if tracked.reserved_until_s is not None and tracked.reserved_until_s <= now_s:
                self.start_failed(instance_id, "did not show within its start budget", now_s, counts=True)

    def unannounced(self) -> list[str]:
        """Nodes that should be told the term, by name."""
        return sorted(
            n.name for n in self.nodes.values() if not n.silent and (n.status is None or n.status.term < self.term)
        )

    def _apply_instances(self, status: WorkerStatus, now_s: float) -> None:
        listed = {i.instance_id for i in status.instances}
        for tracked in self.instances.values():
            row = tracked.row
            if row.node != status.node or row.instance_id in listed or tracked.ended:
                continue
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
            self.instances[instance.instance_id] = tracked
        before = tracked.state
        tracked.status, tracked.reserved_until_s, tracked.gone = instance, None, ""
        if instance.state is InstanceState.READY:
            self.failures.pop(instance.model_id, None)
        elif instance.state is InstanceState.FAILED and before is InstanceState.STARTING:
            self._count_failure(instance.model_id, now_s)

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

    def _node(self, name: str) -> Node:
        return self.nodes.setdefault(name, Node(name))

    def _gpu_bytes(self, model_id: str) -> int | None:
        model = self.models.get(model_id)
        return model.gpu_bytes if model else None

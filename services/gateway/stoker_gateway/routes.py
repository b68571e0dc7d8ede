"""Which instances serve which model, and with how much room. Built from worker status. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stoker_contracts.control import SILENCE_LIMIT_S, InstanceStatus, WorkerStatus
from stoker_contracts.models import InstanceState
from stoker_gateway.newest import Newest

_GONE = frozenset({InstanceState.STOPPED, InstanceState.FAILED})
FAILURES_MAX = 1024  # models whose last failure is remembered


@dataclass
class Route:
    """One instance, as known here.

    room: what the instance last said.  pending: requests sent to it and not answered yet, so not in its room.
    retry_s: when to ask again after it refused for being busy (monotonic); 0: not by time.
    """

    node: str
    boot_id: str
    instance_id: str
    model_id: str
    state: InstanceState
    room: int
    pending: int = 0
    retry_s: float = 0.0


@dataclass(frozen=True)
class Change:
    """What a status changed. lost: instance → why.  models: those that may have room now."""

    lost: dict[str, str]
    models: frozenset[str]


class Routes:
    """The instance alone admits; this keeps a burst from asking where there is surely no room.

    `outstanding` counts this gateway's own requests at an instance, from asking until they end.
    """

    def __init__(self) -> None:
        self.nodes: Newest[WorkerStatus] = Newest()
        self.failures: dict[str, str] = {}
        self._routes: dict[str, Route] = {}
        self._outstanding: Counter[str] = Counter()

    def on_status(self, status: WorkerStatus, now_s: float) -> Change:
        if not self.nodes.offer(status, now_s):
            return Change({}, frozenset())
        listed = {i.instance_id: i for i in status.instances}
        lost = {}
        for route in [r for r in self._routes.values() if r.node == status.node]:
            now = listed.get(route.instance_id)
            if route.boot_id != status.boot_id:
                lost[route.instance_id] = f"node {status.node} started anew"
            elif now is None:
                lost[route.instance_id] = "the instance is gone"
            elif now.state in _GONE:
                lost[route.instance_id] = now.failure or f"the instance {now.state}"
            else:
                continue
            del self._routes[route.instance_id]
        for instance in listed.values():
            self._update(status, instance)
        return Change(lost, frozenset(i.model_id for i in listed.values() if i.state is InstanceState.READY))

    def on_room(self, instance_id: str, room: int) -> str | None:
        """An instance said its room. Returns its model if it may take a request now."""
        route = self._routes.get(instance_id)
        if route is None:
            return None
        route.room = room
        return route.model_id if room > 0 and route.state is InstanceState.READY else None

    def drop_silent(self, now_s: float, *, link_up_since_s: float) -> list[str]:
        """Send nothing to nodes that fell silent. Their streams are judged by their own keepalives."""
        silent = self.nodes.drop_silent(now_s, limit_s=SILENCE_LIMIT_S, link_up_since_s=link_up_since_s)
        self._routes = {i: r for i, r in self._routes.items() if r.node not in silent}
        return silent

    def ready(self, model_id: str) -> list[Route]:
        """Those that may be sent requests: not on a draining node, which is to become idle."""
        return [
            r
            for r in self._routes.values()
            if r.model_id == model_id and r.state is InstanceState.READY and not self._draining(r.node)
        ]

    def reserve(self, model_id: str, *, slots: int) -> Route | None:
        """Take room at the ready instance with the fewest own requests, ties by id; None if there is none.

        slots: of the model's instances; bounds what a stale status promises.
        """
        free = [
            r for r in self.ready(model_id) if min(r.room - r.pending, slots - self._outstanding[r.instance_id]) > 0
        ]
        if not free:
            return None
        best = min(free, key=lambda r: (self._outstanding[r.instance_id], r.instance_id))
        best.pending += 1
        self._outstanding[best.instance_id] += 1
        return best

    def accepted(self, route: Route, room: int) -> None:
        """The instance admitted a reserved request and says what room is left."""
        route.pending -= 1
        route.room = room

    def refused(self, route: Route, *, stopping: bool = False, retry_s: float = 0.0) -> None:
        """It did not, or did not answer: no more requests until it says that it has room, or retry_s has come."""
        route.pending -= 1
        route.room, route.retry_s = 0, retry_s
        if stopping:
            route.state = InstanceState.STOPPING
        self._uncount(route.instance_id)

    def withdrawn(self, route: Route) -> None:
        """The request gave its reservation up before it was answered."""
        route.pending -= 1
        self._uncount(route.instance_id)

    def release(self, instance_id: str) -> None:
        """An own request that was admitted ended: where it was, there is room for one, until the instance says else."""
        self._uncount(instance_id)
        if route := self._routes.get(instance_id):
            route.room += 1

    def reopen(self, now_s: float) -> None:
        """Instances that refused for being busy may be asked again once their time has come."""
        for route in self._routes.values():
            if 0.0 < route.retry_s <= now_s:
                route.room, route.retry_s = max(route.room, 1), 0.0

    def _draining(self, node: str) -> bool:
        status = self.nodes.get(node)
        return status is not None and status.draining

    def _uncount(self, instance_id: str) -> None:
        self._outstanding[instance_id] -= 1
        if self._outstanding[instance_id] <= 0:
            del self._outstanding[instance_id]

    def _update(self, status: WorkerStatus, instance: InstanceStatus) -> None:
        if instance.state is InstanceState.FAILED and instance.failure:
            self.failures.pop(instance.model_id, None)
            self.failures[instance.model_id] = instance.failure
            if len(self.failures) > FAILURES_MAX:
                del self.failures[next(iter(self.failures))]
        if instance.state in _GONE:
            return
        if instance.state is InstanceState.READY:
            self.failures.pop(instance.model_id, None)
        known = self._routes.get(instance.instance_id)
        if known is None:
            self._routes[instance.instance_id] = Route(
                status.node, status.boot_id, instance.instance_id, instance.model_id, instance.state, instance.room
            )
        else:
            known.state, known.room = instance.state, instance.room

"""One model in a simulated cluster: who waits for it, and who serves it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from stoker_contracts.models import InstanceState, ModelSpec
from stoker_sim.profiles import ModelProfile

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.requests import Request


class Line:
    """in_hand: requests that wait or run.  idle_since_s: since when there are none.  coming: instances promised to it that
    start once their devices are free.  need: bytes on each of so many devices."""

    __slots__ = ("coming", "idle_since_s", "in_hand", "instances", "name", "need", "profile", "spec", "waiting")

    def __init__(self, name: str, spec: ModelSpec, profile: ModelProfile) -> None:
        self.name, self.spec, self.profile = name, spec, profile
        self.waiting: deque[Request] = deque()
        self.instances: dict[str, Instance] = {}
        self.in_hand = 0
        self.idle_since_s: float | None = None
        self.coming = 0
        self.need = (spec.gpu_bytes, spec.tensor_parallel)

    def with_room(self) -> Instance | None:
        """The instance that takes the next request: the one with the fewest in hand, ties by which started first."""
        best = None
        for instance in self.instances.values():
            if instance.room > 0 and (best is None or len(instance.running) < len(best.running)):
                best = instance
                if not best.running:
                    break
        return best

    def starting_slots(self) -> int:
        """Requests that instances on their way are going to take."""
        starting = sum(1 for i in self.instances.values() if i.state is InstanceState.STARTING and not i.takes_from)
        return (starting + self.coming) * self.spec.slots

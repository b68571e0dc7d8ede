"""What arrives on the leader's subjects: each message changes the state and wakes who acts on it."""

from __future__ import annotations

from asyncio import Event
from dataclasses import dataclass, field

from stoker_bus.port import Bus, Message, Subscription
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import Demand, StoreStatus, WorkerStatus
from stoker_core.clock import Clock
from stoker_core.logging import get_logger
from stoker_scheduler.state import State

log = get_logger("handlers")


@dataclass(frozen=True)
class Wakes:
    """One event per loop: set to have it run at once."""

    decide: Event = field(default_factory=Event)
    reconcile: Event = field(default_factory=Event)
    announce: Event = field(default_factory=Event)
    models: Event = field(default_factory=Event)
    drain: Event = field(default_factory=Event)
    explain: Event = field(default_factory=Event)


class Handlers:
    def __init__(self, state: State, clock: Clock, wakes: Wakes) -> None:
        self._state, self._clock, self._wakes = state, clock, wakes

    async def subscribe(self, bus: Bus) -> list[Subscription]:
        return [
            await bus.subscribe(subjects.STATUS_WORKER_ALL, self.on_worker_status),
            await bus.subscribe(subjects.STATUS_STORE_ALL, self.on_store_status),
            await bus.subscribe(subjects.SCHEDULER_DEMAND, self.on_demand),
        ]

    async def on_demand(self, message: Message) -> None:
        demand: Demand = decode(Demand, message.data)
        if not self._state.apply_demand(demand, self._clock.monotonic_s()):
            log.warning("demand_dropped", gateway=demand.gateway_id, model_id=demand.model_id)
        if demand.model_id not in self._state.models:
            self._wakes.models.set()
        self._wakes.decide.set()

    async def on_worker_status(self, message: Message) -> None:
        self.heard(decode(WorkerStatus, message.data))

    async def on_store_status(self, message: Message) -> None:
        self._state.apply_store(decode(StoreStatus, message.data), self._clock.monotonic_s())

    def heard(self, status: WorkerStatus) -> None:
        """A worker's state, published or as the answer to a term."""
        if not self._state.apply_status(status, self._clock.monotonic_s()):
            return
        if status.term < self._state.term:
            self._wakes.announce.set()
        self._wakes.reconcile.set()
        self._wakes.decide.set()

"""The worker's heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stoker_bus.port import Bus, send
from stoker_contracts import PROTOCOL_MINOR, subjects
from stoker_contracts.control import STATUS_INTERVAL_S, WorkerStatus
from stoker_contracts.models import EngineKind
from stoker_core.clock import Clock
from stoker_core.runner import every
from stoker_worker.state import WorkerState


class StatusReporter:
    """Sends the full status every second, and at once on a change. Gateways build their routes from it."""

    def __init__(self, bus: Bus, state: WorkerState, clock: Clock, zygote_ready: Callable[[EngineKind], bool]) -> None:
        self._bus, self._state, self._clock, self._zygote_ready = bus, state, clock, zygote_ready
        self._wake = asyncio.Event()
        self._seq = 0

    def changed(self) -> None:
        self._wake.set()

    def status(self) -> WorkerStatus:
        """The status as of now, under the next sequence number."""
        state, now_s = self._state, self._clock.monotonic_s()
        state.forget_ended(now_s)
        self._seq += 1
        return WorkerStatus(
            node=state.node,
            boot_id=state.boot_id,
            seq=self._seq,
            term=state.term,
            devices=state.devices,
            instances=tuple(i.status(now_s) for i in state.instances.values()),
            prepared=tuple(sorted(state.prepared)),
            zygote_ready=all(self._zygote_ready(engine) for engine in state.engines),
            draining=state.draining or state.leaving,
            leaving=state.leaving,
            protocol=PROTOCOL_MINOR,
        )

    async def report(self) -> None:
        await send(self._bus, subjects.status_worker(self._state.node), self.status())

    async def run(self) -> None:
        await every(STATUS_INTERVAL_S, self.report, self._clock, name="status", wake=self._wake)

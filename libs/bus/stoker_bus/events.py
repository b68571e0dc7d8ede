"""Events for people: published beside the work, never holding it up, lost rather than waited for."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from stoker_bus.port import Bus
from stoker_contracts import subjects
from stoker_contracts.codec import encode
from stoker_contracts.events import CloudEvent
from stoker_core.clock import Clock
from stoker_core.errors import BusError, MessageTooLarge
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_core.tracing import inject

log = get_logger("events")

PENDING_MAX = 1000
RETRY_S = 0.5


class EventPublisher:
    """Puts CloudEvents in the event stream, in the order of `emit`.

    At most PENDING_MAX wait for the stream; beyond that the oldest are dropped, and readers see the gap in `sequence`.
    """

    def __init__(self, bus: Bus, *, service: str, name: str, boot_id: str, clock: Clock, ids: Ids) -> None:
        self._bus = bus
        self._source = f"/stoker/{service}/{name}"
        self._boot_id = boot_id
        self._clock = clock
        self._ids = ids
        self._sequence = 0
        self._waiting: deque[tuple[str, str, bytes]] = deque(maxlen=PENDING_MAX)
        self._offered = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self.dropped = 0

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        """Queue one event and return at once.

        event: a constant of stoker_contracts.events.  subject: the model, node or instance it is about.
        data: JSON values. More than CloudEvent's byte limit is logged and dropped, as a gap in the sequence.
        """
        area, what = event
        self._sequence += 1
        record = CloudEvent(
            id=self._ids.new("event"),
            source=self._source,
            type=f"stoker.{area}.{what}",
            time=self._clock.utc().isoformat(timespec="microseconds").replace("+00:00", "Z"),
            subject=subject,
            bootid=self._boot_id,
            sequence=f"{self._sequence:012d}",
            data=data,
            specversion="1.0",
            datacontenttype="application/json",
            traceparent=inject().get("traceparent", ""),
        )
        try:
            encoded = encode(record)
        except MessageTooLarge as error:
            self._lost("event_too_large", type=record.type, bytes=error.size_bytes)
            return
        if len(self._waiting) == PENDING_MAX:
            self._lost("events_overflow", type=record.type)
        self._waiting.append((subjects.event(area, what), record.id, encoded))
        self._idle.clear()
        self._offered.set()

    def part(self) -> Part:
        """The task that publishes. On a stop it sends what waits, trying once where the bus is gone."""
        return Part("events", self._run, stop_intake=self._stop, drain=self.drained)

    async def _run(self) -> None:
        while True:
            while self._waiting:
                subject, message_id, data = self._waiting.popleft()
                await self._append(subject, data, message_id)
            self._idle.set()
            self._offered.clear()
            await self._offered.wait()

    async def _append(self, subject: str, data: bytes, message_id: str) -> None:
        failing = False
        while True:
            try:
                # The id makes a repeat harmless, so an unanswered append is simply made again.
                await self._bus.append(subject, data, message_id=message_id)
                return
            except BusError as error:
                if not error.retryable or self._stopping:
                    self._lost("event_lost", error=error.message)
                    return
                if not failing:
                    log.warning("events_waiting", code=error.code, error=error.message)
                failing = True
            await self._clock.sleep(RETRY_S)

    def _stop(self) -> None:
        self._stopping = True

    async def drained(self) -> None:
        """Return once everything emitted so far is in the stream, or lost."""
        await self._idle.wait()

    def _lost(self, event: str, **fields: object) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, …: an outage must not flood the log
            log.warning(event, dropped=self.dropped, **fields)

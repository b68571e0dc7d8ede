"""Since when this process's own link to the bus has been up: silence counts only from there."""

from __future__ import annotations

from stoker_bus.port import Bus
from stoker_core.clock import Clock

PAUSE_MAX_S = 1.0
"""A gap between two questions longer than this is a pause of this process itself, in which it could hear nobody."""


class Link:
    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._reconnects = bus.reconnects
        self._up_since_s = self._asked_s = clock.monotonic_s()

    def up_since_s(self) -> float:
        """Monotonic seconds; now, while the link is down. Must be asked several times within PAUSE_MAX_S."""
        now_s = self._clock.monotonic_s()
        paused = now_s - self._asked_s > PAUSE_MAX_S
        if paused or not self._bus.connected or self._bus.reconnects != self._reconnects:
            self._reconnects = self._bus.reconnects
            self._up_since_s = now_s
        self._asked_s = now_s
        return self._up_since_s

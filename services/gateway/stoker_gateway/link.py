"""Since when this process's own link to the bus has been up: silence counts only from there."""

from __future__ import annotations

from stoker_bus.port import Bus
from stoker_core.clock import Clock


class Link:
    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._reconnects = bus.reconnects
        self._up_since_s = clock.monotonic_s()

    def up_since_s(self) -> float:
        """Monotonic seconds; now, while the link is down. Must be asked more often than silence is judged."""
        if not self._bus.connected or self._bus.reconnects != self._reconnects:
            self._reconnects = self._bus.reconnects
            self._up_since_s = self._clock.monotonic_s()
        return self._up_since_s

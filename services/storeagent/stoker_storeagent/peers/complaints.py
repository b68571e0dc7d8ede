"""What a log says of clients that misbehave: one line an address and minute, or they could fill it."""

from __future__ import annotations

from collections import OrderedDict

from stoker_core.clock import Clock
from stoker_core.logging import get_logger

log = get_logger("peers")

AGAIN_S = 60.0
ADDRESSES_MAX = 256
"""The address that was complained of longest ago is forgotten first."""


class Complaints:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_s: OrderedDict[str, float] = OrderedDict()

    def about(self, address: str, reason: str, *, node: str = "") -> None:
        """address: without its port, which is another one each time."""
        now_s = self._clock.monotonic_s()
        last_s = self._last_s.get(address)
        if last_s is not None and now_s - last_s < AGAIN_S:
            return
        self._last_s[address] = now_s
        self._last_s.move_to_end(address)
        if len(self._last_s) > ADDRESSES_MAX:
            self._last_s.popitem(last=False)
        log.warning("peer_cut", address=address, reason=reason, node=node)

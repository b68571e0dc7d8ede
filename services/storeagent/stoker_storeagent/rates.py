"""Bandwidth as it was observed, so that one slow moment does not move it."""

from __future__ import annotations

import statistics
from collections import deque

RATES_KEPT = 16
ASSUMED_BYTES_PER_S = 1e9
SAMPLE_S = 0.5
"""A meter's samples are at least so long: shorter ones measure buffers."""


def seconds_for(size_bytes: int, bytes_per_s: float) -> float:
    """What it takes to have so many bytes; at ASSUMED_BYTES_PER_S while the rate is unknown (0)."""
    return size_bytes / (bytes_per_s or ASSUMED_BYTES_PER_S)


class Rate:
    """Bytes per second, as the median of the last 16 transfers."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=RATES_KEPT)

    def add(self, size_bytes: float, seconds: float) -> None:
        """Transfers of nothing or in no time say nothing."""
        if size_bytes > 0 and seconds > 0:
            self._rates.append(size_bytes / seconds)

    @property
    def bytes_per_s(self) -> float:
        """0 while unknown."""
        return statistics.median(self._rates) if self._rates else 0.0


class Meter:
    """The bandwidth of a link that several transfers share: what they got together, per SAMPLE_S in which one was in hand."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._busy = 0
        self._since_s = 0.0
        self._bytes = 0
        self.total_bytes = 0

    @property
    def bytes_per_s(self) -> float:
        return self._rate.bytes_per_s

    def begin(self, now_s: float) -> None:
        if not self._busy:
            self._since_s, self._bytes = now_s, 0
        self._busy += 1

    def add(self, size_bytes: int, now_s: float) -> None:
        self._bytes += size_bytes
        self.total_bytes += size_bytes
        if now_s - self._since_s >= SAMPLE_S:
            self._sample(now_s)

    def end(self, now_s: float) -> None:
        assert self._busy > 0, "nothing was begun"
        self._busy -= 1
        # A short transfer is a sample too if there are no better ones.
        if not self._busy and not self.bytes_per_s:
            self._sample(now_s)

    def _sample(self, now_s: float) -> None:
        self._rate.add(self._bytes, now_s - self._since_s)
        self._since_s, self._bytes = now_s, 0

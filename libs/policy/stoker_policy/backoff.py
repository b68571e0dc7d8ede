"""Doubling waits, computed from counts and ages."""

from __future__ import annotations

BACKOFF_MAX_S = 60
_DOUBLINGS_MAX = 6  # 2**6 s is past the maximum


def backoff_ms(times: int) -> int:
    """How long to wait after something was tried `times` times in a row: min(2**times, 60) s; 0 for none."""
    if times <= 0:
        return 0
    return min(1 << min(times, _DOUBLINGS_MAX), BACKOFF_MAX_S) * 1000

"""How far the predictions of starts were off lately, for the metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stoker_core.clock import Clock
from stoker_core.errors import DatabaseUnavailable
from stoker_db.ports import Decisions

STARTS_MAX = 100
"""The newest starts that count."""
REFRESH_S = 5.0
QUANTILES = (0.5, 0.9)


@dataclass(frozen=True)
class Accuracy:
    """starts: how many were compared.  errors: (part, quantile) → |predicted − actual| ÷ actual; part: total | load."""

    starts: int
    errors: dict[tuple[str, float], float]


class Accuracies:
    """Read from the database when asked, at most every REFRESH_S; while it is away, what was read last holds."""

    def __init__(self, decisions: Decisions, clock: Clock) -> None:
        self._decisions, self._clock = decisions, clock
        self._last = Accuracy(0, {})
        self._read_s: float | None = None

    async def read(self) -> Accuracy:
        now_s = self._clock.monotonic_s()
        if self._read_s is None or now_s - self._read_s >= REFRESH_S:
            self._read_s = now_s
            try:
                records = await self._decisions.concluded(STARTS_MAX)
            except DatabaseUnavailable:
                return self._last
            total = [r.error for r in records if r.error is not None]
            load = [r.load_error for r in records if r.load_error is not None]
            self._last = Accuracy(len(total), {**_quantiles("total", total), **_quantiles("load", load)})
        return self._last


def _quantiles(part: str, errors: Sequence[float]) -> dict[tuple[str, float], float]:
    """By nearest rank; none of none."""
    ordered = sorted(errors)
    return {(part, q): ordered[math.ceil(q * len(ordered)) - 1] for q in QUANTILES} if ordered else {}

"""What this gateway wants of the leader, and when it says so. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from stoker_contracts.control import DEMAND_INTERVAL_S, Demand
from stoker_gateway.queues import Queues


class DemandBook:
    """When to tell the leader what is wanted: at once when a queue begins, then regularly, and once when it ends."""

    _GAP_S = 0.05  # between two messages about one model, so that a queue that comes and goes does not flood

    def __init__(self, gateway_id: str, queues: Queues, jitter: Callable[[], float]) -> None:
        """jitter: a fresh number from 0 to 1."""
        self._gateway_id = gateway_id
        self._queues = queues
        self._jitter = jitter
        self._repeat_s: dict[str, float] = {}  # models that the leader was told of → when to tell it again
        self._sent_s: dict[str, float] = {}

    def due(self, now_s: float) -> list[Demand]:
        """The messages to send now."""
        return [self._tell(m, now_s) for m in self._candidates() if self._due_s(m, now_s) <= now_s]

    def next_s(self, now_s: float) -> float | None:
        """When `due` has something again if no queue changes; None: nothing is waited for."""
        return min((self._due_s(m, now_s) for m in self._candidates()), default=None)

    def _candidates(self) -> list[str]:
        return sorted({*self._queues.models(), *self._repeat_s})

    def _due_s(self, model_id: str, now_s: float) -> float:
        gap_s = self._sent_s.get(model_id, now_s - self._GAP_S) + self._GAP_S
        if model_id in self._repeat_s and self._queues.depth(model_id):
            return max(gap_s, self._repeat_s[model_id])
        return gap_s

    def _tell(self, model_id: str, now_s: float) -> Demand:
        depth = self._queues.depth(model_id)
        if depth:
            self._repeat_s[model_id] = now_s + DEMAND_INTERVAL_S * (0.8 + 0.4 * self._jitter())
            self._sent_s[model_id] = now_s
        else:
            del self._repeat_s[model_id]
            self._sent_s.pop(model_id, None)
        return Demand(
            gateway_id=self._gateway_id,
            model_id=model_id,
            queued=depth,
            oldest_wait_ms=int(self._queues.oldest_s(model_id, now_s) * 1000),
        )

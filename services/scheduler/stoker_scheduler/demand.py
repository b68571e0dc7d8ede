"""What gateways want now: absolute values that expire."""

from __future__ import annotations

from dataclasses import dataclass

from stoker_contracts.control import DEMAND_VALID_S, Demand
from stoker_policy.cluster import DemandView

ENTRIES_MAX = 8192


@dataclass(frozen=True, slots=True)
class _Entry:
    queued: int
    oldest_wait_ms: int
    heard_s: float


class Demands:
    """The newest demand of each (gateway, model), valid for 2 s; at most ENTRIES_MAX of them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._first_s: dict[str, float] = {}

    def apply(self, demand: Demand, now_s: float) -> bool:
        """Take a demand; an empty queue ends it. False: there are too many already, it was dropped."""
        key = (demand.gateway_id, demand.model_id)
        if demand.queued <= 0:
            self._entries.pop(key, None)
        elif key in self._entries or len(self._entries) < ENTRIES_MAX:
            self._entries[key] = _Entry(demand.queued, demand.oldest_wait_ms, now_s)
            self._first_s.setdefault(demand.model_id, now_s)
        else:
            return False
        return True

    def expire(self, now_s: float) -> None:
        self._entries = {k: e for k, e in self._entries.items() if now_s - e.heard_s < DEMAND_VALID_S}
        wanted = {model_id for _, model_id in self._entries}
        self._first_s = {model_id: at_s for model_id, at_s in self._first_s.items() if model_id in wanted}

    def first_seen_s(self, model_id: str) -> float | None:
        """Since when this model has been wanted without a break; None: it is not."""
        return self._first_s.get(model_id)

    def views(self, now_s: float) -> tuple[DemandView, ...]:
        """One per model, of all gateways together."""
        models: dict[str, DemandView] = {}
        for (_, model_id), entry in self._entries.items():
            wait_ms = entry.oldest_wait_ms + round((now_s - entry.heard_s) * 1000)
            sofar = models.get(model_id, DemandView(model_id=model_id, queued=0, oldest_wait_ms=0))
            models[model_id] = DemandView(
                model_id=model_id,
                queued=sofar.queued + entry.queued,
                oldest_wait_ms=max(sofar.oldest_wait_ms, wait_ms),
            )
        return tuple(models.values())

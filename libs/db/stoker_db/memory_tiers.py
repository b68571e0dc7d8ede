"""What tiers hold, how they and the links between nodes did over time, and what loads took: in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from stoker_contracts.control import LinkStatus, TierStatus
from stoker_db.memory_state import State
from stoker_db.ports import LoadObservation, Placement


class MemoryTiers:
    """Implements stoker_db.ports.Tiers."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def place(self, placement: Placement) -> None:
        """A placement of a model that has been deleted meanwhile is left out."""
        self._state.check()
        key = (placement.model_id, placement.node, placement.tier)
        if placement.held_bytes == 0:
            self._state.placements.pop(key, None)
        elif placement.model_id in self._state.files:
            self._state.placements[key] = placement

    async def placements(self, model_id: str | None = None) -> list[Placement]:
        """Ordered by model, node, tier."""
        self._state.check()
        placements = [placement for _, placement in sorted(self._state.placements.items())]
        return [p for p in placements if model_id in (None, p.model_id)]

    async def sample(self, node: str, tiers: Sequence[TierStatus], links: Sequence[LinkStatus] = ()) -> None:
        self._state.check()
        now = self._state.clock.utc()
        self._state.samples.extend((now, node, tier) for tier in tiers)
        self._state.links.extend((now, node, link) for link in links)

    async def latest(self) -> list[tuple[str, TierStatus]]:
        """Ordered by node, tier."""
        self._state.check()
        newest = {(node, tier.tier): tier for _, node, tier in self._state.samples}
        return [(node, tier) for (node, _), tier in sorted(newest.items(), key=lambda item: item[0])]

    async def links(self) -> list[tuple[str, LinkStatus]]:
        """Ordered by node, peer."""
        self._state.check()
        newest = {(node, link.peer): link for _, node, link in self._state.links}
        return [(node, link) for (node, _), link in sorted(newest.items(), key=lambda item: item[0])]

    async def observe(self, observation: LoadObservation) -> None:
        self._state.check()
        self._state.observations.append((self._state.clock.utc(), observation))

    async def observations(self, limit: int = 100) -> list[LoadObservation]:
        self._state.check()
        return [observation for _, observation in reversed(self._state.observations)][:limit]

    async def prune(self, *, keep_s: float) -> int:
        self._state.check()
        before = self._state.clock.utc() - timedelta(seconds=keep_s)
        return sum(
            _drop_old(rows, before) for rows in (self._state.samples, self._state.links, self._state.observations)
        )


def _drop_old(rows: deque[Any], before: datetime) -> int:
    """Drop rows, oldest first, whose own first field is not after `before`. Returns how many."""
    count = len(rows)
    while rows and rows[0][0] <= before:
        rows.popleft()
    return count - len(rows)

"""What the storage agent does by itself: report, reconcile with the database, record, prune."""

from __future__ import annotations

from collections import deque

from stoker_bus.port import Bus, send
from stoker_contracts import PROTOCOL_MINOR, subjects
from stoker_contracts.control import StoreStatus
from stoker_contracts.models import Tier
from stoker_core.logging import get_logger
from stoker_db.ports import Database, LoadObservation, Placement
from stoker_storeagent.tier import SsdTier

log = get_logger("loops")

RECONCILE_S = 30.0
FLUSH_S = 2.0
PRUNE_S = 600.0
OBSERVATIONS_MAX = 256
HELD_LISTED_MAX = 2048
"""Models in one status: more would not fit into a message. The least recently used are left out."""


class Reporter:
    """Says on the bus what this node holds."""

    def __init__(self, bus: Bus, tier: SsdTier, *, node: str, boot_id: str) -> None:
        self._bus, self._tier = bus, tier
        self._node, self._boot_id = node, boot_id
        self._seq = 0

    async def report(self) -> None:
        """Raises Disconnected; the sequence grows only with what was sent."""
        status = StoreStatus(
            node=self._node,
            boot_id=self._boot_id,
            seq=self._seq + 1,
            tiers=self._tier.status(),
            held=tuple(self._tier.held()[:HELD_LISTED_MAX]),
            protocol=PROTOCOL_MINOR,
        )
        await send(self._bus, subjects.status_store(self._node), status)
        self._seq += 1


class Keeper:
    """Keeps Postgres and the tier in agreement, and records what loads and tiers did.

    Observations wait here while the database is away: at most OBSERVATIONS_MAX, then the oldest are dropped.
    """

    def __init__(self, database: Database, tier: SsdTier, *, node: str, keep_s: float) -> None:
        self._database, self._tier, self._node, self._keep_s = database, tier, node, keep_s
        self._waiting: deque[LoadObservation] = deque()

    def observe(self, observation: LoadObservation) -> None:
        if len(self._waiting) == OBSERVATIONS_MAX:
            self._waiting.popleft()
            log.warning("observation_dropped", waiting=OBSERVATIONS_MAX)
        self._waiting.append(observation)

    async def flush(self) -> None:
        """Write the observations that wait. Raises DatabaseUnavailable; what was not written waits on."""
        while self._waiting:
            observation = self._waiting.popleft()
            try:
                await self._database.tiers.observe(observation)
            except BaseException:
                self._waiting.appendleft(observation)
                raise

    async def reconcile(self) -> None:
        """Remove copies of models that were deleted, and make this node's placements say what it holds."""
        # Held before the models are listed, so registered before: what is not listed then was deleted.
        before = {held.model_id for held in self._tier.held()}
        known = {spec.model_id for spec in await self._database.models.all()}
        for model_id in sorted(before - known):
            await self._tier.drop(model_id, "deleted")

        held = {h.model_id: h.held_bytes for h in self._tier.held() if h.model_id in known}
        said = {
            p.model_id: p.held_bytes
            for p in await self._database.tiers.placements()
            if p.node == self._node and p.tier is Tier.SSD
        }
        for model_id in sorted(held.keys() | said.keys()):
            if held.get(model_id, 0) != said.get(model_id, 0):
                placement = Placement(
                    model_id=model_id, node=self._node, tier=Tier.SSD, held_bytes=held.get(model_id, 0)
                )
                await self._database.tiers.place(placement)

    async def sample(self) -> None:
        await self._database.tiers.sample(self._node, self._tier.status())

    async def prune(self) -> None:
        pruned = await self._database.tiers.prune(keep_s=self._keep_s)
        if pruned:
            log.info("pruned", rows=pruned)

"""What the storage agent does by itself: report, reconcile with the database, record, prune."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from stoker_bus.port import Bus, send
from stoker_contracts import PROTOCOL_MINOR, subjects
from stoker_contracts.control import StoreStatus
from stoker_core.logging import get_logger
from stoker_db.ports import Database, LoadObservation, Placement
from stoker_storeagent.ports import Tiers

log = get_logger("loops")

RECONCILE_S = 30.0
FLUSH_S = 2.0
PRUNE_S = 600.0
OBSERVATIONS_MAX = 256
HELD_LISTED_MAX = 2048
"""Entries in one status: more would not fit into a message. The least recently used are left out."""
LINKS_LISTED_MAX = 256


class Reporter:
    """Says on the bus what this node holds."""

    def __init__(self, bus: Bus, tiers: Tiers, *, node: str, boot_id: str, address: Callable[[], str]) -> None:
        """address: where peers get chunks."""
        self._bus, self._tiers = bus, tiers
        self._node, self._boot_id, self._address = node, boot_id, address
        self._seq = 0

    async def report(self) -> None:
        """Raises Disconnected; the sequence grows only with what was sent."""
        status = StoreStatus(
            node=self._node,
            boot_id=self._boot_id,
            seq=self._seq + 1,
            tiers=self._tiers.status(),
            held=tuple(self._tiers.held()[:HELD_LISTED_MAX]),
            protocol=PROTOCOL_MINOR,
            address=self._address(),
            links=self._tiers.links()[:LINKS_LISTED_MAX],
        )
        await send(self._bus, subjects.status_store(self._node), status)
        self._seq += 1


class Keeper:
    """Keeps Postgres and the tiers in agreement, and records what loads and tiers did.

    Observations wait here while the database is away: at most OBSERVATIONS_MAX, then the oldest are dropped.
    """

    def __init__(self, database: Database, tiers: Tiers, *, node: str, keep_s: float) -> None:
        self._database, self._tiers, self._node, self._keep_s = database, tiers, node, keep_s
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
        """Remove models that were deleted, make this node's placements say what it holds, bind digests that wait for it."""
        await self._tiers.bind_waiting()
        # Known here before the models are listed, so registered before: what is not listed then was deleted.
        before = self._tiers.models()
        known = {spec.model_id for spec in await self._database.models.all()}
        for model_id in sorted(before - known):
            await self._tiers.drop(model_id, "deleted")

        held = {(h.model_id, h.tier): h.held_bytes for h in self._tiers.held() if h.model_id in known}
        said = {
            (p.model_id, p.tier): p.held_bytes for p in await self._database.tiers.placements() if p.node == self._node
        }
        for model_id, tier in sorted(held.keys() | said.keys()):
            held_bytes = held.get((model_id, tier), 0)
            if held_bytes != said.get((model_id, tier), 0):
                placement = Placement(model_id=model_id, node=self._node, tier=tier, held_bytes=held_bytes)
                await self._database.tiers.place(placement)

    async def sample(self) -> None:
        await self._database.tiers.sample(self._node, self._tiers.status(), self._tiers.links())

    async def prune(self) -> None:
        pruned = await self._database.tiers.prune(keep_s=self._keep_s)
        if pruned:
            log.info("pruned", rows=pruned)

"""A node's tiers together: models leased to instances, and what is told of them."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from stoker_contracts.control import HeldModel, LinkStatus, TierStatus
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import CorruptCheckpoint, StorageFailed
from stoker_storeagent.pool_tier import PoolTier
from stoker_storeagent.ports import Held, OnProgress
from stoker_storeagent.rings import Rings
from stoker_storeagent.slots import Turn
from stoker_storeagent.ssd_tier import Begun, SsdTier


class NodeTiers:
    """Implements ports.Store and ports.Tiers."""

    def __init__(self, pool: PoolTier, ssd: SsdTier, rings: Rings, clock: Clock) -> None:
        self.pool, self.ssd = pool, ssd
        self._rings, self._clock = rings, clock

    @asynccontextmanager
    async def lease(
        self, model_id: str, instance_id: str, on_progress: OnProgress, *, device: str
    ) -> AsyncIterator[Held]:
        asked_s = self._clock.monotonic_s()
        load, found = await self.pool.load(model_id, instance_id, on_progress=on_progress)
        try:
            async with self._rings.feed(device, load.filling, load.checkpoint.plan) as ring:
                yield Held(
                    model_id=model_id,
                    path=self.ssd.disk.folder(model_id),
                    source=Tier.DRAM if found else load.source,
                    origin="" if found else load.origin,
                    total_bytes=load.checkpoint.weight_bytes + load.checkpoint.small_bytes,
                    wait_ms=(self._clock.monotonic_s() - asked_s) * 1000,
                    descriptors=(load.filling.pool_fd, load.filling.board_fd, *ring),
                    ring=bool(ring),
                )
        finally:
            await self.pool.release(load.resident, instance_id)

    def observe_load(self, held: Held, read_bytes: int, load_ms: float) -> None:
        if held.source is Tier.DRAM:
            self.pool.rate.add(read_bytes, load_ms / 1000)

    async def to_disk(self, model_id: str, turn: Turn, wanted: Sequence[str], begun: Begun) -> None:
        """Bring a model to the disk alone. Raises what `PoolTier.load` and `SsdTier.copy` raise."""
        checkpoint = await self.pool.checkpoint(model_id)
        residents, loads = self.pool.residents, self.pool.loads
        while (resident := residents.find(model_id)) is not None and resident.busy:  # it is on its way to both
            await loads[resident].ended.wait()
        await self.ssd.copy(checkpoint, turn, wanted, begun)

    def name(self, model_id: str) -> str:
        """The model's, for people; empty while it was never used here."""
        known = self.ssd.known.get(model_id)
        return known.name if known is not None else ""

    def held(self) -> list[HeldModel]:
        return self.pool.held() + self.ssd.held()

    def models(self) -> set[str]:
        return self.ssd.known.ids | {held.model_id for held in self.held()}

    def links(self) -> tuple[LinkStatus, ...]:
        return self.ssd.finder.links()

    def status(self) -> tuple[TierStatus, ...]:
        """Of peers and sources: loads that came from them, loads that did not, chunks that wait."""
        rates = [link.read_bytes_per_s for link in self.links() if link.read_bytes_per_s]
        bandwidth = {
            Tier.PEER: statistics.median(rates) if rates else 0.0,
            Tier.REMOTE: self.ssd.finder.remote.bytes_per_s,
        }
        return (
            self.pool.status(),
            self.ssd.status(),
            *(
                TierStatus(
                    tier=tier,
                    capacity_bytes=0,
                    used_bytes=0,
                    hits=self.pool.came_from[tier],
                    misses=self.pool.failed_from[tier],
                    queue=self.ssd.waiting if tier is Tier.REMOTE else 0,
                    read_bytes_per_s=bandwidth[tier],
                )
                for tier in bandwidth
            ),
        )

    async def drop(self, model_id: str, reason: str, *, tier: Tier | None = None) -> bool:
        gone = True
        if tier in (None, Tier.DRAM):
            gone = await self.pool.drop(model_id, reason)
        if tier in (None, Tier.SSD):
            if self.ssd.ledger.pins(model_id):
                gone = False
            else:
                await self.ssd.evict([model_id], reason)
        if tier is None and gone:
            await self._forget(model_id)
        return gone

    async def _forget(self, model_id: str) -> None:
        known = self.ssd.known.get(model_id)
        self.ssd.known.forget(model_id)
        try:
            await self.ssd.disk.forget(model_id)
        except StorageFailed:
            if known is not None:
                self.ssd.known.adopt([known])  # its folder may be there still: whoever drops it again finds it
            raise

    async def bind_waiting(self) -> None:
        for model_id in await self.ssd.known.bind_waiting():
            await self.pool.abandon(model_id, CorruptCheckpoint.code)

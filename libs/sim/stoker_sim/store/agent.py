"""One run of a storage agent: its own logic, put together as `stoker_storeagent.app` does it, on simulated ports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.pool import Pool
from stoker_core.errors import StokerError
from stoker_core.runner import Part, every, run_parts
from stoker_sim.dice import Dice
from stoker_sim.loop import Process, SimClock, SimLoop, crash_point
from stoker_sim.store.catalogue import Registry
from stoker_sim.store.door import Door
from stoker_sim.store.flaws import Flaws
from stoker_sim.store.memory import SimMemory
from stoker_sim.store.node import Node
from stoker_sim.store.peers import SimPeers, Wire
from stoker_sim.store.pool import SimPool
from stoker_sim.store.source import SimSource, SourceState
from stoker_storeagent.adapters.catalogue import DatabaseCatalogue
from stoker_storeagent.adoption import Adoption, Notes
from stoker_storeagent.giving import Giving
from stoker_storeagent.known import Known
from stoker_storeagent.loops import RECONCILE_S, Keeper
from stoker_storeagent.origins import OriginFinder
from stoker_storeagent.orphans import Orphans
from stoker_storeagent.pool_tier import PoolTier
from stoker_storeagent.prefetch import Prefetcher
from stoker_storeagent.rings import Rings
from stoker_storeagent.scrub import Scrub
from stoker_storeagent.sources import Sources
from stoker_storeagent.ssd_tier import SsdTier
from stoker_storeagent.table import PoolTable, ResidentRecord, Snapshot
from stoker_storeagent.throttle import Throttle
from stoker_storeagent.tiers import NodeTiers

DRAIN_S = 0.2
KEEP_S = 3.0
START_S = 0.02
TABLE_BYTES = 1 << 16


class SimTable(PoolTable):
    """A real one. A kill may come before or after a write; torn ones are PoolTable's own tests'."""

    def write(self, snapshot: Snapshot) -> None:
        crash_point("note")
        super().write(snapshot)
        crash_point("noted")


class NoEvents:
    """Implements ports.Events."""

    def __init__(self) -> None:
        self.told: dict[tuple[str, str], int] = {}

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.told[event] = self.told.get(event, 0) + 1


class Agent:
    """`run` is its whole life. The parts are there once it is `up`."""

    def __init__(
        self, node: Node, loop: SimLoop, registry: Registry, source: SourceState, wire: Wire, dice: Dice, flaws: Flaws
    ) -> None:
        self.node, self.process = node, Process(f"agent {node.name}")
        self._loop, self._registry, self._source, self._wire = loop, registry, source, wire
        self._dice, self._flaws = dice, flaws
        self.stop = asyncio.Event()
        self.up = False
        self.events = NoEvents()
        self.excess_bytes = 0
        """What the SSD tier uses over its budget since the start: an earlier run may have had a larger one."""

    async def run(self) -> None:
        """Raises StokerError if it cannot start."""
        node, clock, jitter = self.node, SimClock(self._loop), self._dice.child("jitter").unit
        await asyncio.sleep(self._dice.delay_s(START_S))
        worker = node.worker
        self.pool, self.table, records = self._pool()
        self.loading = frozenset(worker.loading)
        self.heard: asyncio.Queue[str] = worker.connected()
        database = self._registry.line(self._dice.child("database"))
        self.source = SimSource(node.name, self._source, self._dice.child("source"), self._flaws, self._streams)
        known = Known(DatabaseCatalogue(database, cast(Sources, self.source)), node.disk)
        self.peers = SimPeers(node.name, self.process, self._wire, self._dice.child("peers"))
        self.ssd = SsdTier(
            node.disk,
            known,
            OriginFinder(node.name, lambda _: self.source, self.peers, clock, jitter),
            self.events,
            clock,
            _digest,
            capacity_bytes=node.shape.ssd_bytes,
            fetches_at_once=node.shape.fetches_at_once,
            changed=_nothing,
        )
        used = [chunk for record in records for chunk in record.chunks]
        self.memory = SimMemory(self.pool, node.disk, self._dice.child("memory"), self._flaws, used)
        notes = Notes(self.table, self.pool.chunks_total)
        self.dram = PoolTier(
            self.memory,
            self.ssd,
            self.events,
            clock,
            wait_s=node.shape.wait_s,
            changed=_nothing,
            noted=notes.note,
        )
        self.tiers = NodeTiers(self.dram, self.ssd, Rings(cast(Pool, None), 0), clock)
        await self.ssd.open()
        self.excess_bytes = self.ssd.ledger.used_bytes
        self.orphans = Orphans(records, self.loading)
        self.adoption = Adoption(self.dram, self.memory, node.disk, known, clock)
        self.adoption.adopt(records, self.orphans)
        notes.of(self.dram, self.adoption)
        notes.note()
        self.giving = Giving(self.dram, node.disk, self.ssd.ledger, node=node.name)
        self.giving.address = f"{node.name}:1"
        self.keeper = Keeper(database, self.tiers, node=node.name, keep_s=1e9)
        self.prefetcher = Prefetcher(self.tiers, self.events, clock)
        self.door = Door(self.tiers, self.pool, self.process, self._loop, self._dice.child("door"))
        scrub = Scrub(self.ssd.ledger, node.disk, self.events, Throttle(node.shape.scrub_bytes_per_s, clock), clock)
        parts = [
            self.dram.part(),
            self.prefetcher.part(),
            Part("keep", lambda: self._keep(clock)),
            scrub.part(),
            self.door.part(),
            Part("reconcile", lambda: every(RECONCILE_S, self.keeper.reconcile, clock, name="reconcile")),
        ]
        self.up = True
        self.node.came_up(self)
        try:
            await run_parts(parts, self.stop, drain_s=DRAIN_S)
        finally:
            self.up = False

    def order(self, work: Callable[[Agent], object]) -> None:
        """Have something done by the agent itself, at once; a refusal is an answer."""

        async def do() -> None:
            with suppress(StokerError):
                work(self)

        self._loop.spawn(self.process, do())

    def _streams(self, model_id: str) -> bool:
        return any(not one.whole for one in self.dram.residents.all if one.model_id == model_id)

    def _pool(self) -> tuple[SimPool, PoolTable, tuple[ResidentRecord, ...]]:
        kept = self.node.worker.kept
        if kept is not None:
            pool, table = kept
            adopted = SimTable.adopt(table.fileno())
            self.node.opened(adopted)
            snapshot = adopted.read()
            if snapshot is not None:
                self._flaws.require(snapshot.pool_chunks == pool.chunks_total, "the table is of another pool")
                return pool, adopted, snapshot.residents
        pool, made = SimPool(self.node.shape.pool_chunks, self._flaws), SimTable(TABLE_BYTES)
        self.node.opened(pool)
        self.node.opened(made)
        return pool, made, ()

    async def _keep(self, clock: SimClock) -> None:
        """What keep.PoolKeep does: supply the worker, and learn from it which instances start no more."""
        worker = self.node.worker
        await asyncio.sleep(self._dice.delay_s(START_S))
        worker.keep(self.pool, self.table)
        while True:
            if self.node.worker is not worker and self.node.worker.alive:
                worker = self.node.worker
                self.heard = worker.connected()
                self.adoption.released(self.orphans.worker_back(tuple(worker.loading)))
                worker.keep(self.pool, self.table)
            if not worker.alive:
                self.orphans.worker_lost(clock.monotonic_s())
            self.adoption.released(self.orphans.expired(clock.monotonic_s()))
            try:
                async with asyncio.timeout(KEEP_S):
                    ended = await self.heard.get()
            except TimeoutError:
                continue
            await asyncio.sleep(self._dice.delay_s(START_S))
            self.adoption.released(self.orphans.loaded(ended))


async def _digest(chunk: memoryview) -> str:
    return chunk_digest(chunk)


def _nothing() -> None:
    """A report that is not sent."""

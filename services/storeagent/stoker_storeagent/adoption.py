"""What the agent before this one left in the pool: models that are served on, and chunks that somebody may still read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import StorageFailed
from stoker_core.logging import get_logger
from stoker_storeagent.known import Known
from stoker_storeagent.orphans import Orphan, Orphans
from stoker_storeagent.pool_tier import Load, PoolTier
from stoker_storeagent.ports import Disk, Memory
from stoker_storeagent.residents import Resident
from stoker_storeagent.table import PoolTable, ResidentRecord, Snapshot

log = get_logger("adoption")


class Adoption:
    """`adopt` once, after the tiers are open; `released` from then on."""

    def __init__(self, pool: PoolTier, memory: Memory, disk: Disk, known: Known, clock: Clock) -> None:
        self._pool, self._memory, self._disk, self._known, self._clock = pool, memory, disk, known, clock
        self._residents: dict[int, Resident] = {}  # by record
        self._left: dict[Resident, tuple[int, ...]] = {}  # chunks of loads that ended with the agent that filled them
        self._tasks: set[asyncio.Task[None]] = set()

    def adopt(self, records: Sequence[ResidentRecord], orphans: Orphans) -> None:
        """Chunks that nobody can use any more are the pool's again. Raises StorageFailed."""
        holders: dict[int, list[str]] = {}
        for hold in orphans.holds:
            holders.setdefault(hold.resident, []).append(hold.instance_id)
        for index, record in enumerate(records):
            resident = self._served(record) or self._kept(record, holders.get(index, []))
            if resident is None:
                self._memory.free(record.chunks)
                continue
            self._residents[index] = resident
            for instance_id in holders.get(index, []):
                self._pool.residents.share(resident, instance_id)
        log.info("pool_adopted", models=len(list(self._pool.residents)), left=len(self._left))

    def released(self, ended: Sequence[Orphan]) -> None:
        """These instances read from the old pool no more."""
        for hold in ended:
            resident = self._residents[hold.resident]
            self._pool.residents.unshare(resident, hold.instance_id)
            if resident in self._left:
                if not resident.leases:
                    self._pool.residents.free(resident)
                    self._memory.free(self._left.pop(resident))
                    self._pool.room_changed()
            else:
                task = asyncio.create_task(self._pool.let_go(resident), name=f"let go {resident.model_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def left(self) -> list[tuple[Resident, tuple[int, ...]]]:
        return list(self._left.items())

    def _served(self, record: ResidentRecord) -> Resident | None:
        """Of a complete model: its load, made anew around its chunks."""
        checkpoint = self._known.get(record.model_id)
        if not record.complete or checkpoint is None or len(record.chunks) != checkpoint.positions:
            return None
        folder = self._disk.folder(record.model_id)
        filling = self._memory.fill(checkpoint, folder, {}, chunks=record.chunks)
        for position in range(checkpoint.positions):
            filling.publish(position)
        now_s = self._clock.monotonic_s()
        resident = self._pool.residents.add(record.model_id, len(record.chunks), now_s, whole=True)
        resident.complete, resident.busy = True, False
        load = self._pool.loads[resident] = Load(resident, checkpoint, filling, Tier.DRAM)
        load.ended.set()
        return resident

    def _kept(self, record: ResidentRecord, holders: Sequence[str]) -> Resident | None:
        """Of a load that was cut off, or is of no use: its chunks, for as long as somebody may read them."""
        if not holders:
            return None
        now_s = self._clock.monotonic_s()
        resident = self._pool.residents.add(record.model_id, len(record.chunks), now_s, whole=False)
        resident.busy = False
        self._pool.residents.drop(resident)
        self._left[resident] = record.chunks
        return resident


class Notes:
    """Writes down who has which chunks, before anything else happens to them."""

    def __init__(self, table: PoolTable, chunks_total: int) -> None:
        self._table, self._chunks_total = table, chunks_total
        self._content: Callable[[], list[ResidentRecord]] = list

    def of(self, pool: PoolTier, adoption: Adoption) -> None:
        def content() -> list[ResidentRecord]:
            found = [
                _record(resident, load.filling.chunks, complete=resident.complete and not resident.dropped)
                for resident, load in pool.loads.items()
            ]
            return found + [_record(resident, chunks, complete=False) for resident, chunks in adoption.left()]

        self._content = content

    def note(self) -> None:
        try:
            self._table.write(Snapshot(residents=tuple(self._content()), pool_chunks=self._chunks_total))
        except StorageFailed as error:  # the next agent finds what was last written, so nothing of that may stay
            log.error("pool_not_noted", error=error.message)
            self._table.write(Snapshot(residents=(), pool_chunks=self._chunks_total))


def _record(resident: Resident, chunks: tuple[int, ...], *, complete: bool) -> ResidentRecord:
    return ResidentRecord(
        model_id=resident.model_id,
        chunks=chunks,
        complete=complete and resident.whole,
        holders=tuple(sorted(resident.holders)),
    )

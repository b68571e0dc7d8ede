"""The DRAM tier: weights read once into the node's pool, leased to every process that wants them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reading import Reading
from stoker_contracts.control import HeldModel, TierStatus
from stoker_contracts.events import TIER_EVICTED, TIER_FILLED, TIER_FILLING, TIER_REFUSED
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import (
    LoadCancelled,
    PoolExhausted,
    ReadFailed,
    RefusedCheckpoint,
    StokerError,
    Stopping,
    StorageFailed,
)
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.plans import Checkpoint, Plans
from stoker_storeagent.ports import Events, Held, OnProgress
from stoker_storeagent.residents import Resident, Residents
from stoker_storeagent.rings import Rings
from stoker_storeagent.state import Rate
from stoker_storeagent.tier import PROGRESS_S, SsdTier

log = get_logger("dram")

_LASTING = (errno.EIO, errno.ENOENT)


@dataclass(eq=False)
class _Load:
    """What fills a resident's chunks.  ended: nobody waits on the reading any more, so it may be closed."""

    resident: Resident
    reading: Reading
    checkpoint: Checkpoint
    started_s: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class DramTier:
    """Implements ports.Store and ports.Tiers on top of the SSD tier. `part` must run; who made the pool closes it after.

    A reading that nobody leases any more is not stopped: what it reads is likely to be asked for again. Its model lies in
    the pool as long as its copy lies on the SSD and nobody needs the room.
    """

    def __init__(
        self,
        pool: Pool,
        ssd: SsdTier,
        plans: Plans,
        rings: Rings,
        events: Events,
        clock: Clock,
        *,
        wait_s: float,
        changed: Callable[[], None],
    ) -> None:
        """wait_s: how long a lease waits for room in the pool.  changed: told when what is held changes."""
        self._pool, self._ssd, self._plans, self._rings = pool, ssd, plans, rings
        self._events, self._clock, self._changed = events, clock, changed
        self._wait_s = wait_s
        self._residents = Residents(pool.status().total_bytes // CHUNK_BYTES)
        self._loads: dict[Resident, _Load] = {}
        self._making_room = asyncio.Lock()
        self._freed = asyncio.Event()  # another one after each time that there may be more room
        self._group: asyncio.TaskGroup | None = None
        self._hits = self._misses = self._waiting = 0
        self._rate = Rate()

    def part(self) -> Part:
        """Follows the readings. When it ends all of them are cancelled and have let go of the pool."""
        return Part("readings", self._run)

    @asynccontextmanager
    async def lease(self, model_id: str, on_progress: OnProgress, *, weights: bool, device: str) -> AsyncIterator[Held]:
        asked_s = self._clock.monotonic_s()
        async with self._ssd.lease(model_id, on_progress) as held:
            if not weights:
                yield held
                return
            load, found = await self._load(held, on_progress)
            try:
                async with self._rings.feed(device, load.reading, load.checkpoint.plan) as ring:
                    yield msgspec.structs.replace(
                        held,
                        source=Tier.DRAM if found and held.source is Tier.SSD else held.source,
                        wait_ms=(self._clock.monotonic_s() - asked_s) * 1000,
                        descriptors=(load.reading.pool_fd, load.reading.board_fd, *ring),
                        ring=bool(ring),
                    )
            finally:
                await self._release(load.resident)

    def observe_load(self, held: Held, read_bytes: int, load_ms: float) -> None:
        if held.source is Tier.DRAM:
            self._rate.add(read_bytes, load_ms / 1000)
        elif not held.descriptors:  # else the reading itself was timed
            self._ssd.observe_read(read_bytes, load_ms / 1000)

    def held(self) -> list[HeldModel]:
        complete = sorted((r for r in self._residents if r.complete), key=lambda r: (-r.used_s, r.model_id))
        return [self._held(resident) for resident in complete] + self._ssd.held()

    def status(self) -> tuple[TierStatus, ...]:
        total, free = self._residents.chunks_total, self._residents.chunks_free
        dram = TierStatus(
            tier=Tier.DRAM,
            capacity_bytes=total * CHUNK_BYTES,
            used_bytes=(total - free) * CHUNK_BYTES,
            hits=self._hits,
            misses=self._misses,
            queue=self._waiting,
            read_bytes_per_s=self._rate.bytes_per_s,
        )
        return dram, *self._ssd.status()

    async def drop(self, model_id: str, reason: str) -> bool:
        return await self._ssd.drop(model_id, reason)

    def forget(self, model_id: str) -> None:
        """Its files are gone: nobody may lease it here any more."""
        self._plans.forget(model_id)
        resident = self._residents.find(model_id)
        if resident is not None:
            self._residents.drop(resident)
            if self._residents.unwanted(resident) and self._group is not None:
                self._group.create_task(self._evict(resident, "files_gone"), name=f"evict {model_id}")

    def _held(self, resident: Resident) -> HeldModel:
        size_bytes = self._loads[resident].checkpoint.manifest.file_bytes
        return HeldModel(
            model_id=resident.model_id,
            tier=Tier.DRAM,
            held_bytes=size_bytes,
            total_bytes=size_bytes,
            leases=resident.leases,
        )

    async def _load(self, held: Held, on_progress: OnProgress) -> tuple[_Load, bool]:
        """The model's load, leased; and whether it was here. Waits for room until the time for that is over."""
        deadline_s = self._clock.monotonic_s() + self._wait_s
        self._waiting += 1
        try:
            while True:
                checkpoint = await self._checkpoint(held.model_id)
                freed = self._freed  # before looking: what is freed after that ends the wait
                try:
                    async with self._making_room:
                        return await self._join_or_begin(held, checkpoint)
                except PoolExhausted:
                    await self._more_room(freed, deadline_s, on_progress, held.total_bytes)
                    if self._clock.monotonic_s() >= deadline_s:
                        raise
        finally:
            self._waiting -= 1

    async def _more_room(
        self, freed: asyncio.Event, deadline_s: float, on_progress: OnProgress, total_bytes: int
    ) -> None:
        while not freed.is_set() and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            try:
                async with asyncio.timeout(min(left_s, PROGRESS_S)):
                    await freed.wait()
            except TimeoutError:
                await on_progress(0, total_bytes)

    async def _checkpoint(self, model_id: str) -> Checkpoint:
        try:
            return await self._plans.of(model_id)
        except RefusedCheckpoint as error:  # it was a checkpoint when it was copied
            self._refused(model_id, error)
            raise

    async def _join_or_begin(self, held: Held, checkpoint: Checkpoint) -> tuple[_Load, bool]:
        """Raises PoolExhausted if there is no room now."""
        model_id = held.model_id
        resident = self._residents.find(model_id)
        if resident is not None:
            self._residents.lease(resident, self._clock.monotonic_s())
            self._hits += 1
            return self._loads[resident], True
        positions = len(checkpoint.plan.positions)
        chunks = self._residents.fit(positions)
        for victim in self._residents.evict(chunks):
            await self._evict(victim, "room")
        if self._group is None:
            raise Stopping
        window = chunks if chunks < positions else 0
        now_s = self._clock.monotonic_s()
        reading = self._read(held, checkpoint, window)
        load = _Load(self._residents.add(model_id, chunks, now_s, whole=not window), reading, checkpoint, now_s)
        self._loads[load.resident] = load
        watch = self._group.create_task(self._watch(load), name=f"read {model_id}")
        watch.add_done_callback(lambda _: load.ended.set())  # also if it was cancelled before its first step
        self._misses += 1
        return load, False

    def _read(self, held: Held, checkpoint: Checkpoint, window_chunks: int) -> Reading:
        size_bytes = checkpoint.plan.read_bytes
        try:
            reading = self._pool.read(
                checkpoint.plan,
                checkpoint.manifest,
                held.path,
                window_chunks=window_chunks,
                verify=checkpoint.verified,
            )
        except OSError as error:  # no descriptor or memory left: this lease's failure alone
            raise StorageFailed(str(held.path), error.strerror or str(error)) from error
        if window_chunks:
            log.info("streaming", model_id=held.model_id, bytes=size_bytes, window_bytes=window_chunks * CHUNK_BYTES)
        else:
            self._events.emit(TIER_FILLING, held.model_id, model=checkpoint.name, tier=Tier.DRAM, bytes=size_bytes)
        return reading

    async def _watch(self, load: _Load) -> None:
        resident = load.resident
        async with self._ssd.pinned(resident.model_id):
            try:
                await load.reading.wait()
                self._completed(load, self._clock.monotonic_s() - load.started_s)
            except LoadCancelled:  # nobody wanted it any more
                self._residents.drop(resident)
            except StokerError as error:
                self._residents.drop(resident)
                self._refused(resident.model_id, error)
            finally:
                load.ended.set()
            if self._residents.unwanted(resident):
                await self._free(resident)
        self._room_changed()

    def _completed(self, load: _Load, seconds: float) -> None:
        resident, size_bytes = load.resident, load.checkpoint.plan.read_bytes
        resident.complete = True
        if not resident.whole:  # its pace was the client's
            return
        self._ssd.observe_read(size_bytes, seconds)
        took_ms, model = round(seconds * 1000), load.checkpoint.name
        log.info("read", model=model, model_id=resident.model_id, bytes=size_bytes, duration_ms=took_ms)
        self._events.emit(TIER_FILLED, resident.model_id, model=model, tier=Tier.DRAM, bytes=size_bytes, ms=took_ms)

    def _refused(self, model_id: str, error: StokerError) -> None:
        """Say it, and do away with a copy that will not get better."""
        log.warning("read_failed", model_id=model_id, code=error.code, error=error.message)
        self._events.emit(TIER_REFUSED, model_id, tier=Tier.DRAM, code=error.code, message=error.message)
        if is_lasting(error):
            self._ssd.condemn(model_id, error.code)

    async def _release(self, resident: Resident) -> None:
        self._residents.release(resident, self._clock.monotonic_s())
        if self._residents.unwanted(resident):
            await self._free(resident)
        self._room_changed()

    async def _evict(self, resident: Resident, reason: str) -> None:
        await self._free(resident)
        size_bytes = resident.chunks * CHUNK_BYTES
        log.info("evicted", model_id=resident.model_id, tier=Tier.DRAM, bytes=size_bytes, reason=reason)
        self._events.emit(TIER_EVICTED, resident.model_id, tier=Tier.DRAM, bytes=size_bytes, reason=reason)

    async def _free(self, resident: Resident) -> None:
        """Give its chunks back once nothing is read into them any more. No-op for the second who wants that."""
        load = self._loads.pop(resident, None)
        if load is not None and await self._closed(load):
            self._residents.free(resident)
            self._room_changed()

    async def _closed(self, load: _Load) -> bool:
        load.reading.cancel()
        await load.ended.wait()
        try:
            await load.reading.aclose()
        except ReadFailed as error:  # the disk does not answer, and may still write to the chunks: they are lost to us
            log.error("chunks_lost", model_id=load.resident.model_id, chunks=load.resident.chunks, error=error.message)
            return False
        return True

    def _room_changed(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()
        self._changed()

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                try:
                    await asyncio.Event().wait()
                finally:
                    self._group = None
        finally:
            while self._loads:
                resident, load = self._loads.popitem()
                self._residents.drop(resident)
                await self._closed(load)


def is_lasting(error: StokerError) -> bool:
    """Whether a copy is what is wrong, so that only another copy helps: not, say, a want of descriptors."""
    cause = error.__cause__
    if isinstance(error, RefusedCheckpoint):
        return not isinstance(cause, OSError) or cause.errno in _LASTING
    return isinstance(error, ReadFailed) and error.errno in _LASTING

"""The SSD tier: models copied from their sources on first use, leased to instances, evicted when others need the room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stoker_contracts.control import HeldModel, TierStatus
from stoker_contracts.events import TIER_EVICTED, TIER_FILLED, TIER_FILLING, TIER_REFUSED
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import Overloaded, StokerError, Stopping, StorageFailed, TierFull
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.filler import Filler
from stoker_storeagent.ports import Catalogue, Events, Held, OnProgress
from stoker_storeagent.state import Entry, Ledger, Rate
from stoker_storeagent.threads import in_thread

log = get_logger("tier")

PROGRESS_S = 0.1
FILLS_MAX = 64
FREE_SHARE = 0.8
"""Of the file system, when no capacity is set."""


@dataclass(eq=False)
class _Fill:
    """One copy in progress, shared by all who wait for the model."""

    finished: asyncio.Event = field(default_factory=asyncio.Event)
    error: StokerError | None = field(default_factory=Stopping)  # until it is known better
    task: asyncio.Task[None] | None = None
    total_bytes: int = 0
    done_bytes_of: dict[str, int] = field(default_factory=dict)  # per file: written by one thread each

    @property
    def done_bytes(self) -> int:
        return sum(self.done_bytes_of.copy().values())


class SsdTier:
    """Leases plain files. `open` comes first, then `part` must run."""

    def __init__(
        self,
        ssd: SsdDirectory,
        filler: Filler,
        catalogue: Catalogue,
        events: Events,
        clock: Clock,
        *,
        capacity_bytes: int,
        changed: Callable[[], None],
        gone: Callable[[str], None] = lambda model_id: None,
    ) -> None:
        """capacity_bytes: 0 for a share of what is free or held already.

        changed: told when what is held changes.  gone: told which model's copy is taken away, before another can be made.
        """
        self._ssd, self._filler, self._catalogue = ssd, filler, catalogue
        self._events, self._clock, self._changed, self._gone = events, clock, changed, gone
        self._ledger = Ledger(Tier.SSD, capacity_bytes)
        self._fills: dict[str, _Fill] = {}
        self._condemned: dict[str, tuple[Entry, str]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self._hits = self._misses = self._copied = self._failed = 0
        self._ssd_rate, self._remote_rate = Rate(), Rate()

    async def open(self) -> None:
        """Adopt what an earlier run left complete, remove what it left unfinished. Raises StorageFailed."""
        found = await asyncio.to_thread(self._ssd.open)
        # Their order of use is not known any more; the order of their arrival is the best there is.
        found.sort(key=lambda item: item[1])
        for rank, (stored, _) in enumerate(found):
            self._ledger.adopt(stored.model_id, stored.total_bytes, used_s=float(rank - len(found)))
        if self._ledger.capacity_bytes == 0:
            free = await asyncio.to_thread(self._ssd.free_bytes)
            self._ledger.capacity_bytes = int((free + self._ledger.used_bytes) * FREE_SHARE)
        await self._remove(self._ledger.excess(), "capacity")
        log.info("tier_open", models=len(list(self._ledger)), capacity_bytes=self._ledger.capacity_bytes)

    def part(self) -> Part:
        """Runs the copies. On a stop those in progress are given up, and who waits for them hears Stopping."""
        return Part("copies", self._run, stop_intake=self._stop)

    @asynccontextmanager
    async def lease(self, model_id: str, on_progress: OnProgress) -> AsyncIterator[Held]:
        asked_s = self._clock.monotonic_s()
        self._ledger.pin(model_id)
        try:
            entry = self._ledger.ready(model_id)
            source = Tier.SSD if entry else Tier.REMOTE
            self._hits += entry is not None
            self._misses += entry is None
            if entry is None:
                entry = await self._fetched(model_id, on_progress)
            entry.used_s = self._clock.monotonic_s()
            yield Held(
                model_id=model_id,
                path=self._ssd.path(model_id),
                source=source,
                total_bytes=entry.size_bytes,
                wait_ms=(entry.used_s - asked_s) * 1000,
            )
        finally:
            await self._unpin(model_id)

    @asynccontextmanager
    async def pinned(self, model_id: str) -> AsyncIterator[None]:
        """Keep a copy that is leased now, longer than its lease."""
        self._ledger.pin(model_id)
        try:
            yield
        finally:
            await self._unpin(model_id)

    def observe_read(self, size_bytes: int, seconds: float) -> None:
        """Files of this tier were read, whatever tier they had come from."""
        self._ssd_rate.add(size_bytes, seconds)

    def held(self) -> list[HeldModel]:
        """Complete models, the most recently used first."""
        ready = sorted((e for e in self._ledger if e.ready), key=lambda e: (-e.used_s, e.model_id))
        return [
            HeldModel(
                model_id=entry.model_id,
                tier=Tier.SSD,
                held_bytes=entry.size_bytes,
                total_bytes=entry.size_bytes,
                leases=self._ledger.pins(entry.model_id),
            )
            for entry in ready
        ]

    def status(self) -> tuple[TierStatus, ...]:
        ssd = TierStatus(
            tier=Tier.SSD,
            capacity_bytes=self._ledger.capacity_bytes,
            used_bytes=self._ledger.used_bytes,
            hits=self._hits,
            misses=self._misses,
            read_bytes_per_s=self._ssd_rate.bytes_per_s,
        )
        remote = TierStatus(
            tier=Tier.REMOTE,
            capacity_bytes=0,
            used_bytes=0,
            hits=self._copied,
            misses=self._failed,
            queue=len(self._fills),
            read_bytes_per_s=self._remote_rate.bytes_per_s,
        )
        return ssd, remote

    async def drop(self, model_id: str, reason: str) -> bool:
        """Remove a model's copy unless it is leased or being filled. Returns whether it was removed."""
        entry = self._ledger.ready(model_id)
        if entry is None or self._ledger.pins(model_id):
            return False
        self._ledger.forget(model_id)
        await self._remove([entry], reason)
        return True

    def condemn(self, model_id: str, code: str) -> None:
        """A copy that cannot be read as it was written is leased no more: the next lease makes another.

        It stays for those who lease it, until they leave or another takes its place.  code: of the error that showed it.
        """
        entry = self._ledger.ready(model_id)
        if entry is not None:
            log.warning("copy_condemned", model_id=model_id, code=code)
            self._ledger.forget(model_id)
            self._condemned[model_id] = (entry, code)
            self._gone(model_id)
            self._changed()

    async def _unpin(self, model_id: str) -> None:
        self._ledger.unpin(model_id)
        if not self._ledger.pins(model_id):
            await self._remove_condemned(model_id)

    async def _remove_condemned(self, model_id: str) -> None:
        entry, code = self._condemned.pop(model_id, (None, ""))
        if entry is not None:
            try:
                await self._remove([entry], code)
            except StorageFailed as error:  # it may be gone already
                log.warning("copy_not_removed", model_id=model_id, error=error.message)

    async def _fetched(self, model_id: str, on_progress: OnProgress) -> Entry:
        fill = self._fills.get(model_id) or self._begin(model_id)
        while not fill.finished.is_set():
            try:
                async with asyncio.timeout(PROGRESS_S):
                    await fill.finished.wait()
            except TimeoutError:
                await on_progress(fill.done_bytes, fill.total_bytes)
        if fill.error is not None:
            raise fill.error
        entry = self._ledger.ready(model_id)
        assert entry is not None, "a pinned model stays"
        return entry

    def _begin(self, model_id: str) -> _Fill:
        if self._group is None or self._stopping:
            raise Stopping
        if len(self._fills) >= FILLS_MAX:
            raise Overloaded("the copy queue", retry_after_ms=1000)
        fill = self._fills[model_id] = _Fill()
        fill.task = self._group.create_task(self._fill(model_id, fill), name=f"copy {model_id}")
        fill.task.add_done_callback(lambda _: self._end(model_id, fill))
        return fill

    async def _fill(self, model_id: str, fill: _Fill) -> None:
        try:
            await self._copy(model_id, fill)
            fill.error = None
            self._copied += 1
        except StokerError as error:
            fill.error = error
            self._failed += 1
            log.warning("copy_failed", model_id=model_id, code=error.code, error=error.message)
            self._events.emit(TIER_REFUSED, model_id, tier=Tier.SSD, code=error.code, message=error.message)

    def _end(self, model_id: str, fill: _Fill) -> None:
        """However the copy ended, even if it was cancelled before its first step."""
        if fill.error is not None:
            self._ledger.forget(model_id)
        del self._fills[model_id]
        fill.finished.set()
        self._changed()

    async def _copy(self, model_id: str, fill: _Fill) -> None:
        spec, files = await self._catalogue.find(model_id)
        fill.total_bytes = sum(file.size_bytes for file in files)
        started_s = self._clock.monotonic_s()
        await self._remove_condemned(model_id)
        await self._remove(self._ledger.reserve(model_id, fill.total_bytes, started_s), "room")
        self._events.emit(TIER_FILLING, model_id, model=spec.name, tier=Tier.SSD, bytes=fill.total_bytes)
        temporary = await self._room_on_disk(partial(self._ssd.begin, model_id, files))
        try:
            copying_s = self._clock.monotonic_s()
            stored = await self._filler.copy(spec, files, temporary, fill.done_bytes_of.__setitem__)
            copied_s = self._clock.monotonic_s()
            await self._catalogue.bind(model_id, {file.path: file.digest for file in stored.files})
            await in_thread(partial(self._ssd.publish, temporary, stored), threading.Event())
        except BaseException:
            await asyncio.to_thread(self._ssd.abandon, temporary)
            raise
        self._ledger.filled(model_id)
        self._remote_rate.add(fill.total_bytes, copied_s - copying_s)
        took_ms = round((self._clock.monotonic_s() - started_s) * 1000)
        log.info("copied", model=spec.name, model_id=model_id, bytes=fill.total_bytes, duration_ms=took_ms)
        self._events.emit(TIER_FILLED, model_id, model=spec.name, tier=Tier.SSD, bytes=fill.total_bytes, ms=took_ms)

    async def _room_on_disk(self, begin: Callable[[], Path]) -> Path:
        """Others may fill the file system: what the budget allows, the disk may not. Raises TierFull."""
        while True:
            try:
                return await asyncio.to_thread(begin)
            except TierFull:
                victim = self._ledger.evict_one()
                if victim is None:
                    raise
                await self._remove([victim], "disk_full")

    async def _remove(self, victims: list[Entry], reason: str) -> None:
        for victim in victims:
            self._gone(victim.model_id)
        # The names go at once, so that a new copy of the same model cannot meet the old one.
        aside = [(victim, self._ssd.set_aside(victim.model_id)) for victim in victims]
        for victim, path in aside:
            await asyncio.to_thread(self._ssd.discard, path)
            log.info("evicted", model_id=victim.model_id, bytes=victim.size_bytes, reason=reason)
            self._events.emit(TIER_EVICTED, victim.model_id, tier=Tier.SSD, bytes=victim.size_bytes, reason=reason)
        if victims:
            self._changed()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            await asyncio.Event().wait()

    def _stop(self) -> None:
        self._stopping = True
        for fill in self._fills.values():
            if fill.task is not None:
                fill.task.cancel()

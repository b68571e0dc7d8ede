"""The DRAM tier: models on their way into the node's pool and in it, held by whoever uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.control import HeldModel, TierStatus
from stoker_contracts.events import TIER_EVICTED, TIER_FILLED, TIER_FILLING, TIER_REFUSED
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import CorruptCheckpoint, LoadCancelled, PoolExhausted, ReadFailed, StokerError, Stopping
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.origins import Origins
from stoker_storeagent.ports import Events, Filling, Memory, OnProgress
from stoker_storeagent.rates import Rate, seconds_for
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.residents import Resident, Residents
from stoker_storeagent.shelving import Shelving
from stoker_storeagent.slots import Turn
from stoker_storeagent.ssd_tier import SsdTier
from stoker_storeagent.targets import PoolTarget
from stoker_storeagent.transfer import Transfer

log = get_logger("pool")

PROGRESS_S = 0.1
PRIORITY_START, PRIORITY_PREFETCH = 1, 0


@dataclass(eq=False)
class Load:
    """What fills a resident.  source, origin: where it came from.  ended: its transfer runs no more, so it may be closed.

    error: why it is no good; None while it is, or may be.
    """

    resident: Resident
    checkpoint: Checkpoint
    filling: Filling
    source: Tier
    origin: str = ""
    turn: Turn = field(default_factory=Turn)
    transfer: Transfer | None = None
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: StokerError | None = None

    def digest(self, position: int) -> str:
        if self.transfer is not None and position in self.transfer.digests:
            return self.transfer.digests[position]
        return self.checkpoint.digest(position)


class PoolTier:
    """`part` must run; who made the pool closes it after.

    A load that nobody holds any more is not stopped: what was asked for once is likely to be asked for again.
    """

    def __init__(
        self,
        memory: Memory,
        ssd: SsdTier,
        events: Events,
        clock: Clock,
        *,
        wait_s: float,
        changed: Callable[[], None],
        noted: Callable[[], None],
    ) -> None:
        """wait_s: how long a lease waits for room.  changed: told when what is held changes.

        noted: told, before anything else happens, when chunks of the pool change hands.
        """
        self._memory, self._ssd, self._events, self._clock = memory, ssd, events, clock
        self._wait_s, self._changed, self._noted = wait_s, changed, noted
        self.residents = Residents(memory.chunks_total, self._reread_s)
        self.loads: dict[Resident, Load] = {}
        self._making_room = asyncio.Lock()
        self._freed = asyncio.Event()  # another one after each time that there may be more room
        self._group: asyncio.TaskGroup | None = None
        self._freeing: set[asyncio.Future[None]] = set()
        self._waiting = self.hits = self.misses = 0
        self.came_from: dict[Tier, int] = dict.fromkeys((Tier.PEER, Tier.REMOTE), 0)  # loads
        self.failed_from: dict[Tier, int] = dict.fromkeys((Tier.PEER, Tier.REMOTE), 0)
        self.rate = Rate()

    def part(self) -> Part:
        """Runs the transfers. When it ends all of them are cancelled and have let go of the pool."""
        return Part("transfers", self._run)

    async def load(
        self,
        model_id: str,
        holder: str,
        *,
        on_progress: OnProgress | None = None,
        turn: Turn | None = None,
        wanted: Sequence[str] = (),
    ) -> tuple[Load, bool]:
        """A model's load, held by `holder`; and whether it was here. Waits for room until the time for that is over.

        holder: empty: it is for later, and nobody holds it; then it lies in the pool whole or not at all.
        wanted: peers to take it from.
        """
        deadline_s = self._clock.monotonic_s() + self._wait_s
        self._waiting += 1
        try:
            while True:
                checkpoint = await self.checkpoint(model_id)
                origins = await self._origins(checkpoint, wanted)
                freed = self._freed  # before looking: what is freed after that ends the wait
                try:
                    async with self._making_room:
                        return await self._join_or_begin(checkpoint, holder, turn or Turn(), origins, wanted)
                except PoolExhausted:
                    if not holder:
                        raise
                    await self._more_room(freed, deadline_s, on_progress, checkpoint.weight_bytes)
                    if self._clock.monotonic_s() >= deadline_s:
                        raise
        finally:
            self._waiting -= 1

    async def checkpoint(self, model_id: str) -> Checkpoint:
        """As `Known.find`; what lies here and is not what others bound meanwhile is given up."""
        checkpoint = await self._ssd.known.find(model_id)
        if self._ssd.contradicts(checkpoint):
            await self.abandon(model_id, CorruptCheckpoint.code)
        return checkpoint

    async def abandon(self, model_id: str, reason: str) -> None:
        """What lies here of a model is not what belongs to it: nobody gets it any more."""
        resident = self.residents.find(model_id)
        if resident is not None:
            self.residents.drop(resident)
            if not resident.complete:  # whoever waits for the rest is told
                self.loads[resident].filling.fail(0)
            if self.residents.unwanted(resident):
                await self._evict([resident], reason)
        await self._ssd.evict([model_id], reason)

    async def drop(self, model_id: str, reason: str) -> bool:
        """Returns whether nothing of it is left here: False while it is held, or is brought for somebody."""
        resident = self.residents.find(model_id)
        if resident is None:
            return True
        if resident.leases or (resident.busy and not resident.yielding):
            return False
        self.residents.drop(resident)
        await self._evict([resident], reason)
        return True

    async def release(self, resident: Resident, holder: str) -> None:
        self.residents.release(resident, holder, self._clock.monotonic_s())
        self._noted()
        await self.let_go(resident)

    async def let_go(self, resident: Resident) -> None:
        """Somebody holds it no more."""
        if self.residents.unwanted(resident):
            await self.free(resident)
        self.room_changed()

    async def give_up(self, load: Load) -> None:
        """Who asked for it ahead wants it no more: it ends, unless somebody else has asked for it meanwhile."""
        if load.resident.yielding and not load.resident.complete and not load.resident.dropped:
            self.residents.drop(load.resident)
            await self.free(load.resident)

    async def free(self, resident: Resident) -> None:
        """Give its chunks back once nothing is read into them any more. No-op for the second who wants that.

        A caller who is cancelled does not stop it: the chunks would be nobody's.
        """
        load = self.loads.pop(resident, None)
        if load is None:
            return
        self._noted()  # before others may have them: nobody is to take what will lie there for this model
        freeing = asyncio.ensure_future(self._free(load))
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)
        await asyncio.shield(freeing)

    def room_changed(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()
        self._changed()

    def held(self) -> list[HeldModel]:
        """The most recently used first; also what is there in part."""
        found = [
            HeldModel(
                model_id=resident.model_id,
                tier=Tier.DRAM,
                held_bytes=self.ready_bytes(self.loads[resident]),
                total_bytes=self.loads[resident].checkpoint.weight_bytes,
                leases=resident.leases,
            )
            for resident in sorted(self.residents, key=lambda resident: (-resident.used_s, resident.model_id))
        ]
        return [held for held in found if held.held_bytes]

    def status(self) -> TierStatus:
        total, free = self.residents.chunks_total, self.residents.chunks_free
        return TierStatus(
            tier=Tier.DRAM,
            capacity_bytes=total * CHUNK_BYTES,
            used_bytes=(total - free) * CHUNK_BYTES,
            hits=self.hits,
            misses=self.misses,
            queue=self._waiting,
            read_bytes_per_s=self.rate.bytes_per_s,
        )

    async def _origins(self, checkpoint: Checkpoint, wanted: Sequence[str]) -> Origins | None:
        """Of what is neither in the pool nor on the disk."""
        if self.residents.find(checkpoint.model_id) is not None or not self._ssd.missing(checkpoint)[0]:
            return None
        return await self._ssd.finder.find(checkpoint, wanted)

    async def _join_or_begin(
        self, checkpoint: Checkpoint, holder: str, turn: Turn, origins: Origins | None, wanted: Sequence[str]
    ) -> tuple[Load, bool]:
        """Raises PoolExhausted if there is no room now."""
        resident = self.residents.find(checkpoint.model_id)
        if resident is not None:
            load = self.loads[resident]
            self.hits += 1
            load.turn.hasten(turn.rank)
            self._hold(resident, holder)
            return load, True
        if self._group is None:
            raise Stopping
        chunks = self.residents.fit(checkpoint.positions, starting=turn.starting)
        victims = self.residents.evict(chunks, self._clock.monotonic_s(), starting=turn.starting)
        await self._evict(victims, "room")
        if chunks > self.residents.chunks_free:  # a disk that does not answer keeps what was evicted
            raise PoolExhausted(chunks * CHUNK_BYTES, self.residents.chunks_free * CHUNK_BYTES)
        await self._ssd.take_over(checkpoint.model_id)
        self.misses += 1
        load = await self._begin(checkpoint, chunks, turn, origins, wanted)
        self._hold(load.resident, holder)
        return load, False

    def _hold(self, resident: Resident, holder: str) -> None:
        if holder:
            self.residents.hold(resident, holder, self._clock.monotonic_s())
            self._noted()

    async def _begin(
        self, checkpoint: Checkpoint, chunks: int, turn: Turn, origins: Origins | None, wanted: Sequence[str]
    ) -> Load:
        model_id, window = checkpoint.model_id, chunks < checkpoint.positions
        shelving = self._ssd.shelving(checkpoint, required=False)
        missing, digests = self._ssd.missing(checkpoint)
        disk = self._ssd.disk
        try:
            # From here on the model is pinned: what the disk has of it stays.
            await shelving.open(sum(checkpoint.place(position)[2] for position in missing))
            if missing and origins is None:  # it was here when they would have been looked for
                origins = await self._ssd.finder.find(checkpoint, wanted)
            missing, digests = self._ssd.missing(checkpoint)  # again: a scrub may have found a chunk damaged meanwhile
            if self._group is None:  # since we waited
                raise Stopping
            filling = self._memory.fill(
                checkpoint,
                disk.folder(model_id),
                {position: (disk.chunk(digest), digest) for position, digest in digests.items()},
                window_chunks=chunks if window else 0,
                priority=PRIORITY_START if turn.starting else PRIORITY_PREFETCH,
            )
        except BaseException:
            shelving.close()
            raise
        now_s = self._clock.monotonic_s()
        resident = self.residents.add(model_id, chunks, now_s, whole=not window, yielding=not turn.starting)
        load = self.loads[resident] = Load(resident, checkpoint, filling, Tier.SSD, turn=turn)
        if missing and origins is not None and origins.first is not None:
            load.source, load.origin = origins.first.tier, origins.first.name
        target = PoolTarget(filling, self._clock, window=window)
        load.transfer = self._ssd.transfer(checkpoint, target, shelving, turn, wanted, origins)
        self._count(load)
        self._group.create_task(self._ssd.touch(model_id), name=f"touch {model_id}")
        load.task = self._group.create_task(self._follow(load, shelving), name=f"load {model_id}")
        load.task.add_done_callback(lambda _: self._ended(load, shelving))
        self._noted()
        self._say(TIER_FILLING, load, window=window)
        return load

    def _count(self, load: Load) -> None:
        if load.source is Tier.SSD:
            self._ssd.hits += 1
        else:
            self._ssd.misses += 1
            self.came_from[load.source] += 1

    def _say(self, event: tuple[str, str], load: Load, **data: object) -> None:
        checkpoint = load.checkpoint
        self._events.emit(
            event,
            checkpoint.model_id,
            model=checkpoint.name,
            tier=Tier.DRAM,
            bytes=checkpoint.weight_bytes,
            source=load.source,
            origin=load.origin,
            **data,
        )

    async def _follow(self, load: Load, shelving: Shelving) -> None:
        """Bring it in; say how that went. Whoever waits for it hears from the board."""
        checkpoint, transfer = load.checkpoint, load.transfer
        assert transfer is not None
        began_s = self._clock.monotonic_s()
        try:
            async with asyncio.TaskGroup() as group:
                ready = group.create_task(self._completed(load, began_s))
                try:
                    await transfer.run()
                    load.checkpoint = await self._ssd.bind(checkpoint, transfer)
                except StokerError as error:
                    load.error = error  # what the load's consumers get to know is less
                    raise
                await ready
        except* StokerError as failures:
            self._failed(load, load.error or failures.exceptions[0])

    async def _completed(self, load: Load, began_s: float) -> None:
        """In memory as a whole, though copies to the disk may still be under way."""
        resident, checkpoint = load.resident, load.checkpoint
        await load.filling.wait()
        resident.complete = True
        self._noted()
        self._changed()
        seconds = self._clock.monotonic_s() - began_s
        if resident.whole and load.source is Tier.SSD:  # of a window the pace was its client's
            self._ssd.rate.add(checkpoint.weight_bytes, seconds)
        ms = round(seconds * 1000)
        log.info(
            "filled", model_id=resident.model_id, model=checkpoint.name, source=load.source, origin=load.origin, ms=ms
        )
        self._say(TIER_FILLED, load, ms=ms)

    def _failed(self, load: Load, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, StokerError)
        load.error = error
        self.residents.drop(load.resident)
        if isinstance(error, LoadCancelled):  # nobody wanted it any more
            return
        model_id = load.resident.model_id
        if load.source in self.failed_from:
            self.failed_from[load.source] += 1
        log.warning("load_failed", model_id=model_id, code=error.code, error=error.message)
        self._events.emit(TIER_REFUSED, model_id, tier=Tier.DRAM, code=error.code, message=error.message)

    def _ended(self, load: Load, shelving: Shelving) -> None:
        """Also if it was cancelled before its first step."""
        shelving.close()
        load.resident.busy = False
        if not load.resident.complete:
            load.error = load.error or LoadCancelled()
            self.residents.drop(load.resident)
        load.filling.cancel()  # no-op for one that is done
        load.ended.set()
        self._noted()
        if self.residents.unwanted(load.resident) and self._group is not None:
            self._group.create_task(self.free(load.resident), name=f"free {load.resident.model_id}")
        self.room_changed()

    async def _more_room(
        self, freed: asyncio.Event, deadline_s: float, on_progress: OnProgress | None, total_bytes: int
    ) -> None:
        while not freed.is_set() and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            try:
                async with asyncio.timeout(min(left_s, PROGRESS_S)):
                    await freed.wait()
            except TimeoutError:
                if on_progress is not None:
                    await on_progress(0, total_bytes)

    async def _evict(self, victims: Sequence[Resident], reason: str) -> None:
        """They were dropped, and nobody holds them."""
        for resident in victims:
            size_bytes = resident.chunks * CHUNK_BYTES
            log.info("evicted", model_id=resident.model_id, tier=Tier.DRAM, bytes=size_bytes, reason=reason)
            self._events.emit(TIER_EVICTED, resident.model_id, tier=Tier.DRAM, bytes=size_bytes, reason=reason)
        await asyncio.gather(*(self.free(resident) for resident in victims))

    async def _free(self, load: Load) -> None:
        if await self._closed(load):
            self.residents.free(load.resident)
            self._noted()
            self.room_changed()

    async def _closed(self, load: Load) -> bool:
        if load.task is not None and not load.ended.is_set():
            load.task.cancel()
            await load.ended.wait()
        try:
            await load.filling.aclose()
        except ReadFailed as error:  # the disk does not answer, and may still write to the chunks: they are lost to us
            log.error("chunks_lost", model_id=load.resident.model_id, chunks=load.resident.chunks, error=error.message)
            return False
        return True

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = self._ssd.group = group
                try:
                    await asyncio.Event().wait()
                finally:
                    self._group = self._ssd.group = None
                    # What was noted last is what the next agent finds: complete models among it are served on, and who
                    # holds one now may read on. So at once, before the leases that end with us take themselves out.
                    self._noted = _nothing
        finally:
            while self.loads:
                resident, load = self.loads.popitem()
                self.residents.drop(resident)
                await self._closed(load)
            if self._freeing:
                await asyncio.wait(self._freeing)

    def _reread_s(self, model_id: str, size_bytes: int) -> float:
        if self._ssd.whole(model_id):
            return seconds_for(size_bytes, self._ssd.rate.bytes_per_s)
        return self._ssd.refetch_s(model_id, size_bytes)

    def ready_bytes(self, load: Load) -> int:
        if load.resident.complete:
            return load.checkpoint.weight_bytes
        ready = [position for position in range(load.checkpoint.positions) if load.filling.is_ready(position)]
        return sum(load.checkpoint.place(position)[2] for position in ready)


def _nothing() -> None:
    """The notes are closed."""

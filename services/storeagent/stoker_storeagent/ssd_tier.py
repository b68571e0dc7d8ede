"""The SSD tier: which chunks of which models lie on the node's disk, and how more of them get there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stoker_contracts.control import HeldModel, TierStatus
from stoker_contracts.events import TIER_EVICTED
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import CorruptCheckpoint, LoadCancelled, Overloaded, StokerError, Stopping, StorageFailed
from stoker_core.logging import get_logger
from stoker_storeagent.known import Known
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.origins import OriginFinder, Origins
from stoker_storeagent.ports import Disk, Events
from stoker_storeagent.rates import Rate, seconds_for
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.shelving import Shelving
from stoker_storeagent.slots import Slots, Turn
from stoker_storeagent.targets import DiskTarget
from stoker_storeagent.transfer import Digest, Target, Transfer

log = get_logger("ssd")

FREE_SHARE = 0.8
"""Of the file system, when no capacity is set."""

Begun = Callable[[Transfer], None]


class SsdTier:
    """`open` comes first. What is copied to the disk alone runs in `group`, while there is one."""

    def __init__(
        self,
        disk: Disk,
        known: Known,
        finder: OriginFinder,
        events: Events,
        clock: Clock,
        digest: Digest,
        *,
        capacity_bytes: int,
        fetches_at_once: int,
        changed: Callable[[], None],
    ) -> None:
        """capacity_bytes: 0 for a share of what is free or held already.  changed: told when what is held changes."""
        self.disk, self.known, self.finder = disk, known, finder
        self._events, self._clock, self._digest, self._changed = events, clock, digest, changed
        self._at_once = fetches_at_once
        self._slots = Slots(fetches_at_once)
        self._copying: dict[str, asyncio.Task[StokerError | None]] = {}
        self.ledger = Ledger(capacity_bytes, self.refetch_s)
        self.group: asyncio.TaskGroup | None = None
        self._removing: set[asyncio.Future[None]] = set()
        self.rate = Rate()
        self.hits = self.misses = 0

    async def open(self) -> None:
        """Adopt what an earlier run left on the disk. Raises StorageFailed."""
        contents = await self.disk.open()
        self.known.adopt(contents.checkpoints)
        for checkpoint in contents.checkpoints:
            digests = dict(contents.learnt.get(checkpoint.model_id, {}))
            if checkpoint.bound:
                digests = {position: checkpoint.digest(position) for position in range(checkpoint.positions)}
            held = {
                at: (digest, contents.chunks[digest]) for at, digest in digests.items() if digest in contents.chunks
            }
            # When they were used is known by another clock; their order is what matters.
            used_s = contents.used_s.get(checkpoint.model_id, 0.0) - max(contents.used_s.values(), default=0.0)
            if held:
                self.ledger.adopt(checkpoint.model_id, checkpoint.weight_bytes, held, used_s)
        for digest in contents.chunks.keys() - self.ledger.chunks.keys():
            await self.disk.remove(digest)
        if self.ledger.capacity_bytes == 0:
            free = await self.disk.free_bytes()
            self.ledger.capacity_bytes = int((free + self.ledger.used_bytes) * FREE_SHARE)
        await self.evict(self.ledger.excess(self._clock.monotonic_s()), "capacity")
        log.info(
            "tier_open",
            models=len(list(self.ledger)),
            bytes=self.ledger.used_bytes,
            capacity_bytes=self.ledger.capacity_bytes,
        )

    def refetch_s(self, model_id: str, size_bytes: int) -> float:
        return seconds_for(size_bytes, self.finder.remote.bytes_per_s)

    def whole(self, model_id: str) -> bool:
        shelf = self.ledger.shelf(model_id)
        return shelf is not None and self.ledger.held_bytes(model_id) == shelf.total_bytes

    def contradicts(self, checkpoint: Checkpoint) -> bool:
        """Whether chunks lie here that are not those which were bound meanwhile."""
        shelf = self.ledger.shelf(checkpoint.model_id)
        held = shelf.digests if shelf is not None and checkpoint.bound else {}
        return any(digest != checkpoint.digest(position) for position, digest in held.items())

    def missing(self, checkpoint: Checkpoint) -> tuple[list[int], dict[int, str]]:
        """Positions that the disk lacks, in order; digests of those that it has."""
        shelf = self.ledger.shelf(checkpoint.model_id)
        digests = dict(shelf.digests) if shelf is not None else {}
        return [position for position in range(checkpoint.positions) if position not in digests], digests

    def shelving(self, checkpoint: Checkpoint, *, required: bool) -> Shelving:
        return Shelving(checkpoint, self.ledger, self.disk, self._events, self._clock, self.evict, required=required)

    def transfer(
        self,
        checkpoint: Checkpoint,
        target: Target,
        shelving: Shelving,
        turn: Turn,
        wanted: Sequence[str],
        origins: Origins | None = None,
    ) -> Transfer:
        """Of what the disk lacks. wanted: peers to take it from.  origins: if they were looked for already."""
        missing, digests = self.missing(checkpoint)

        async def find() -> Origins:
            return origins or await self.finder.find(checkpoint, wanted)

        return Transfer(
            checkpoint,
            target,
            shelving,
            find,
            self._digest,
            missing=missing,
            digests=digests,
            slots=self._slots,
            turn=turn,
            at_once=min(self._at_once, len(missing)) or 1,
        )

    async def copy(self, checkpoint: Checkpoint, turn: Turn, wanted: Sequence[str], begun: Begun) -> None:
        """Bring a model to the disk alone. begun: told of the transfer, if there is anything to fetch.

        Raises TierFull, what keeps it from coming, and LoadCancelled if a load takes over: see `take_over`.
        """
        model_id = checkpoint.model_id
        if model_id in self._copying:
            raise Overloaded(f"the way of {model_id} to the disk", retry_after_ms=1000)
        if self.group is None:
            raise Stopping
        copying = self._copying[model_id] = self.group.create_task(self._copy(checkpoint, turn, wanted, begun))
        copying.add_done_callback(lambda _: self._copying.pop(model_id))
        try:
            error = await asyncio.shield(copying)
        except asyncio.CancelledError:
            copying.cancel()
            await asyncio.wait([copying])
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise LoadCancelled from None
        if error is not None:
            raise error

    async def take_over(self, model_id: str) -> None:
        """What is on its way to the disk alone goes on as part of a load: no byte is fetched twice."""
        copying = self._copying.get(model_id)
        if copying is not None:
            copying.cancel()
            await asyncio.wait([copying])

    async def bind(self, checkpoint: Checkpoint, transfer: Transfer) -> Checkpoint:
        """Raises CorruptCheckpoint if the model has other bytes elsewhere: then nothing of these stays."""
        if checkpoint.bound:
            return checkpoint
        try:
            return await self.known.bind(
                checkpoint, [transfer.digests[position] for position in range(checkpoint.positions)]
            )
        except CorruptCheckpoint:
            await self.evict([checkpoint.model_id], CorruptCheckpoint.code)
            raise

    async def evict(self, model_ids: Sequence[str], reason: str) -> None:
        orphans: list[str] = []
        for model_id in model_ids:
            held_bytes = self.ledger.held_bytes(model_id)
            if self.ledger.shelf(model_id) is None:
                continue
            orphans += self.ledger.evict(model_id)
            log.info("evicted", model_id=model_id, tier=Tier.SSD, bytes=held_bytes, reason=reason)
            self._events.emit(TIER_EVICTED, model_id, tier=Tier.SSD, bytes=held_bytes, reason=reason)
        if model_ids:
            self._changed()
        # A caller who is cancelled does not stop it: nobody else would remove them before the next start.
        removing = asyncio.ensure_future(self._remove(orphans))
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)
        await asyncio.shield(removing)

    async def _remove(self, orphans: Sequence[str]) -> None:
        """Raises StorageFailed for one that cannot be removed, once the others are."""
        failure: StorageFailed | None = None
        for digest in orphans:
            if digest not in self.ledger.chunks:  # it has not come back meanwhile
                try:
                    await self.disk.remove(digest)
                except StorageFailed as error:
                    failure = error
        if failure is not None:
            raise failure

    async def touch(self, model_id: str) -> None:
        """It was used now; an earlier use is forgotten."""
        self.ledger.used(model_id, self._clock.monotonic_s())
        try:
            await self.disk.touch(model_id)
        except StorageFailed as error:  # a worse choice at an eviction after the next start
            log.warning("not_touched", model_id=model_id, error=error.message)

    def held(self) -> list[HeldModel]:
        """The most recently used first."""
        shelves = sorted(self.ledger, key=lambda shelf: (-shelf.used_s, shelf.model_id))
        return [
            HeldModel(
                model_id=shelf.model_id,
                tier=Tier.SSD,
                held_bytes=self.ledger.held_bytes(shelf.model_id),
                total_bytes=shelf.total_bytes,
                leases=self.ledger.pins(shelf.model_id),
            )
            for shelf in shelves
            if shelf.digests
        ]

    def status(self) -> TierStatus:
        return TierStatus(
            tier=Tier.SSD,
            capacity_bytes=self.ledger.capacity_bytes,
            used_bytes=self.ledger.used_bytes,
            hits=self.hits,
            misses=self.misses,
            queue=len(self._copying),
            read_bytes_per_s=self.rate.bytes_per_s,
        )

    @property
    def waiting(self) -> int:
        """Chunks that wait for their turn to be fetched."""
        return self._slots.waiting

    async def _copy(
        self, checkpoint: Checkpoint, turn: Turn, wanted: Sequence[str], begun: Begun
    ) -> StokerError | None:
        missing, _ = self.missing(checkpoint)
        if not missing:
            return None
        shelving = self.shelving(checkpoint, required=True)
        try:
            await shelving.open(sum(checkpoint.place(position)[2] for position in missing))
            transfer = self.transfer(checkpoint, DiskTarget(checkpoint, self._at_once), shelving, turn, wanted)
            begun(transfer)
            await transfer.run()
            await self.bind(checkpoint, transfer)
        except StokerError as error:
            return error
        finally:
            shelving.close()
            self._changed()
        return None

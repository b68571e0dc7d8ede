"""One model's place on the SSD while chunks are on their way to it."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence

from stoker_contracts.events import TIER_DAMAGED, TIER_FILLED, TIER_FILLING, TIER_REFUSED
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import CorruptCheckpoint, LoadCancelled, ReadFailed, StokerError, StorageFailed, TierFull
from stoker_core.logging import get_logger
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.ports import Disk, Events, Part
from stoker_storeagent.records import Checkpoint

log = get_logger("ssd")

Evict = Callable[[Sequence[str], str], Awaitable[None]]
"""(model ids, reason): take their copies away; of all of them from the ledger at once."""

_LASTING = (errno.EIO, errno.ENOENT)


class Shelving:
    """Implements transfer.Shelving. `open`, then `close`; between them the model is not evicted."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ledger: Ledger,
        disk: Disk,
        events: Events,
        clock: Clock,
        evict: Evict,
        *,
        required: bool,
    ) -> None:
        """required: without a copy on the disk the transfer is for nothing."""
        self._checkpoint, self._ledger, self._disk = checkpoint, ledger, disk
        self._events, self._clock, self._evict, self._required = events, clock, evict, required
        self._model_id = checkpoint.model_id
        self._pinned = self._claimed = self._working = False
        self._began_s, self._copied_bytes = 0.0, 0

    async def open(self, missing_bytes: int) -> None:
        """Take the room. If somebody copies this model already nothing is copied here.

        Raises, if the copy is required, LoadCancelled in that case, and TierFull, StorageFailed.
        """
        self._ledger.pin(self._model_id)
        self._pinned = True
        self._claimed = self._working = self._ledger.claim(self._model_id)
        if not self._claimed:
            if self._required:
                raise LoadCancelled
            return
        self._began_s, self._copied_bytes = self._clock.monotonic_s(), 0
        try:
            await self._reserve(missing_bytes)
        except (TierFull, StorageFailed) as error:
            self.failed(error)
        if missing_bytes and self._working:
            self._say(TIER_FILLING, bytes=missing_bytes)

    def close(self) -> None:
        """Also after an `open` that failed, or was cancelled at any point."""
        if self._claimed:
            self._ledger.settle(self._model_id)
            if self._copied_bytes and self._ledger.held_bytes(self._model_id) == self._checkpoint.weight_bytes:
                ms = round((self._clock.monotonic_s() - self._began_s) * 1000)
                self._say(TIER_FILLED, bytes=self._copied_bytes, ms=ms)
        if self._pinned:
            self._ledger.unpin(self._model_id)
        self._pinned = self._claimed = self._working = False

    async def part(self, position: int) -> Part | None:
        shelf = self._ledger.shelf(self._model_id)
        if not self._working or shelf is None or position in shelf.digests:
            return None
        return await self._disk.part(self._model_id, position)

    async def arriving(self, position: int, digest: str) -> None:
        """Raises TierFull, StorageFailed."""
        if not self._checkpoint.bound:
            await self._disk.learn(self._model_id, position, digest)

    async def arrived(self, position: int, digest: str) -> None:
        """Raises StorageFailed."""
        if self._ledger.shelf(self._model_id) is None:  # given up meanwhile: others bound other digests
            if digest not in self._ledger.chunks:
                await self._disk.remove(digest)
            return
        _, _, size_bytes = self._checkpoint.place(position)
        self._ledger.arrived(self._model_id, position, digest, size_bytes)
        self._copied_bytes += size_bytes

    async def stray(self, digest: str) -> None:
        if digest not in self._ledger.chunks:
            try:
                await self._disk.remove(digest)
            except StorageFailed as error:
                log.warning("not_removed", digest=digest, error=error.message)

    async def make_room(self) -> bool:
        victims = self._ledger.worst(self._clock.monotonic_s())
        await self._evict(victims, "disk_full")
        return bool(victims)

    def failed(self, error: StokerError) -> None:
        if not self._working:
            return
        self._working = False
        log.warning("not_copied", model_id=self._model_id, code=error.code, error=error.message)
        self._events.emit(TIER_REFUSED, self._model_id, tier=Tier.SSD, code=error.code, message=error.message)
        if self._required:
            raise error

    async def damaged(self, position: int, error: StokerError) -> None:
        shelf = self._ledger.shelf(self._model_id)
        digest = shelf.digests.get(position, "") if shelf is not None else ""
        if not digest or not is_lasting(error):
            return
        _, _, size_bytes = self._checkpoint.place(position)
        try:
            await drop_chunk(digest, error, self._ledger, self._disk, self._events)
            if self._working:
                await self._reserve(size_bytes)
        except (TierFull, StorageFailed) as failure:
            self.failed(failure)

    def _say(self, event: tuple[str, str], **data: object) -> None:
        self._events.emit(event, self._model_id, model=self._checkpoint.name, tier=Tier.SSD, **data)

    async def _reserve(self, size_bytes: int) -> None:
        now_s = self._clock.monotonic_s()
        victims = self._ledger.reserve(self._model_id, self._checkpoint.weight_bytes, size_bytes, now_s)
        await self._evict(victims, "room")


async def drop_chunk(digest: str, error: StokerError, ledger: Ledger, disk: Disk, events: Events) -> None:
    """A chunk on the disk is no good any more: whoever wants it next fetches it anew."""
    owners = ledger.lose(digest)
    log.warning("chunk_damaged", digest=digest, models=owners, code=error.code, error=error.message)
    for model_id in owners:
        events.emit(TIER_DAMAGED, model_id, tier=Tier.SSD, digest=digest, code=error.code, message=error.message)
    await disk.remove(digest)


def is_lasting(error: StokerError) -> bool:
    """Whether the file is what is wrong: not, say, a want of descriptors."""
    if isinstance(error, ReadFailed):
        return error.errno in _LASTING
    return isinstance(error, CorruptCheckpoint)

"""Reads what lies on the SSD, slowly and for ever, so that a chunk that rots is found before it is needed."""

from __future__ import annotations

from stoker_core.clock import Clock
from stoker_core.errors import CorruptCheckpoint, StorageFailed
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.ports import Disk, Events
from stoker_storeagent.shelving import drop_chunk
from stoker_storeagent.throttle import Throttle

log = get_logger("scrub")

IDLE_S = 10.0
"""While there is nothing."""
ROUND_S = 6 * 3600.0
"""From the end of a round to the next: what rots does so in months, and reading wears some disks."""


class Scrub:
    def __init__(self, ledger: Ledger, disk: Disk, events: Events, throttle: Throttle, clock: Clock) -> None:
        """throttle: unlimited: nothing is scrubbed."""
        self._ledger, self._disk, self._events = ledger, disk, events
        self._throttle, self._clock = throttle, clock

    def part(self) -> Part:
        return Part("scrub", self._run)

    async def round(self) -> int:
        """Check every chunk that is here now. Returns how many were no good; whoever wants them next fetches them anew."""
        damaged = 0
        for digest, size_bytes in sorted(self._ledger.chunks.items()):
            await self._throttle.take(size_bytes)
            if digest in self._ledger.chunks and not await self._disk.intact(digest) and digest in self._ledger.chunks:
                damaged += 1
                error = CorruptCheckpoint(str(self._disk.chunk(digest)), "it does not have the digest that names it")
                try:
                    await drop_chunk(digest, error, self._ledger, self._disk, self._events)
                except StorageFailed as failure:  # nobody is given it any more; the next start tries again to remove it
                    log.warning("not_removed", digest=digest, error=failure.message)
        return damaged

    async def _run(self) -> None:
        while True:
            if self._throttle.bytes_per_s and self._ledger.chunks:
                damaged = await self.round()
                log.info("scrubbed", chunks=len(self._ledger.chunks), damaged=damaged)
                await self._clock.sleep(ROUND_S)
            await self._clock.sleep(IDLE_S)

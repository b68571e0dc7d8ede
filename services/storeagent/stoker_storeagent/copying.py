"""One chunk on its way from the pool to the disk, while it is still arriving in the pool."""

from __future__ import annotations

import asyncio

from stoker_checkpoint.plan import ALIGN_BYTES
from stoker_storeagent.ports import Part

PIECE_BYTES = 4 * 1024 * 1024
"""Written at once, or more if more has arrived by then."""
PAUSE_S = 0.05
"""After so long less is written, too: what arrived before it is not fetched again after a crash."""


class Copy:
    """Appends to a part what has arrived in `buffer`, in pieces, beside whoever fills it. `start`, then `finish`, `discard` or `close`.

    What is appended stays the part's, so the next who wants the chunk begins there.
    """

    def __init__(self, part: Part, buffer: memoryview, *, room: int = 0) -> None:
        """room: how often room had been made on the disk when it began."""
        self._part, self._buffer, self.room = part, buffer, room
        self._arrived = part.size_bytes
        self._more = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    @property
    def begun_bytes(self) -> int:
        """What the part had from an earlier run."""
        return min(self._part.size_bytes, len(self._buffer))

    async def read_begun(self) -> None:
        """Put into the buffer what the part has. Raises StorageFailed."""
        await self._part.read(self._buffer[: self.begun_bytes])

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write(), name="copy to ssd")

    def arrived(self, size_bytes: int) -> None:
        """The first size_bytes of the chunk are in the buffer."""
        if size_bytes > self._arrived:
            self._arrived = size_bytes
            if size_bytes == len(self._buffer) or size_bytes - self._part.size_bytes >= PIECE_BYTES:
                self._more.set()

    async def finish(self, digest: str) -> None:
        """All of it arrived and is right: give it its name on the disk. Raises TierFull, StorageFailed."""
        assert self._writing is not None, "it was not started"
        assert self._arrived == len(self._buffer), "it has not all arrived"
        await asyncio.shield(self._writing)
        await self._part.finish(digest)

    async def discard(self) -> None:
        """What arrived is not what belongs here."""
        await self._stop()
        await self._part.discard()

    async def close(self) -> None:
        """Stop writing. What is on the disk stays. Idempotent."""
        try:
            await self._stop()
        finally:
            self._part.close()

    async def _stop(self) -> None:
        """Until nothing is written any more, even for who is cancelled meanwhile: what is written to must not be closed."""
        if self._writing is None:
            return
        self._writing.cancel()
        cancelled: asyncio.CancelledError | None = None
        while not self._writing.done():
            try:
                await asyncio.wait([self._writing])
            except asyncio.CancelledError as error:
                cancelled = error
        if not self._writing.cancelled():
            self._writing.exception()  # seen: `finish` is where it matters
        if cancelled is not None:
            raise cancelled

    async def _write(self) -> None:
        size_bytes = len(self._buffer)
        while (done := self._part.size_bytes) < size_bytes:
            if self._arrived < size_bytes and self._arrived - done < PIECE_BYTES and await self._more_comes():
                continue
            upto = self._arrived
            if upto < size_bytes:
                upto -= upto % ALIGN_BYTES
            if upto > done:
                await self._part.write(self._buffer[done:upto])

    async def _more_comes(self) -> bool:
        """Whether a piece, or the rest, arrived within PAUSE_S."""
        self._more.clear()
        try:
            async with asyncio.timeout(PAUSE_S):
                await self._more.wait()
        except TimeoutError:
            return False
        return True

"""Digests of chunks that have arrived, beside the event loop: it lets go of the interpreter while it works."""

from __future__ import annotations

from functools import partial

from stoker_checkpoint.digests import chunk_digest
from stoker_storeagent.threads import Threads

THREADS = 2
"""One digests more than any network brings; the other goes on where the first waits for the interpreter."""


class DigestThreads:
    def __init__(self) -> None:
        self._threads = Threads(THREADS, "digest")

    async def of(self, chunk: memoryview) -> str:
        """As `chunk_digest`. On cancellation it returns once nothing reads the chunk any more."""
        return await self._threads.run(partial(chunk_digest, chunk))

    def close(self) -> None:
        self._threads.close()

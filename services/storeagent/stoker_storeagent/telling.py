"""Tells how many bytes have come, not more often than is of use."""

from __future__ import annotations

import asyncio

from stoker_storeagent.ports import OnBytes

AFTER_BYTES = 1024 * 1024
"""Pieces come by a few hundred KiB, and who is told has some work with each."""
AFTER_S = 0.05


class Telling:
    """Of one read. `came` after every piece, and `end`, however it ends: what came is there to go on from."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._loop = asyncio.get_running_loop()
        self._told_s = float("-inf")  # the first is told at once
        self._done = self._told = 0

    def came(self, size_bytes: int) -> None:
        """So many bytes are there in all."""
        self._done = size_bytes
        if size_bytes - self._told >= AFTER_BYTES or self._loop.time() - self._told_s >= AFTER_S:
            self.end()

    def end(self) -> None:
        """Tell what was not told yet."""
        if self._done > self._told:
            self._told, self._told_s = self._done, self._loop.time()
            self._on_bytes(self._done)

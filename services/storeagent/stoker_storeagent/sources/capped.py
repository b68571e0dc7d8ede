"""A source that takes its share of the node's bandwidth, and no more."""

from __future__ import annotations

from stoker_storeagent.ports import Inspected, OnBytes, Source
from stoker_storeagent.throttle import Throttle

PIECE_BYTES = 4 * 1024 * 1024
"""Asked for at once where there is a limit: requests are what can be held back, not what answers them."""


class Capped:
    """Implements ports.Source. Registration is not held back: it reads little."""

    def __init__(self, source: Source, throttle: Throttle) -> None:
        self._source, self._throttle = source, throttle

    @property
    def kind(self) -> str:
        return self._source.kind

    async def inspect(self, url: str) -> Inspected:
        return await self._source.inspect(url)

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        piece_bytes = PIECE_BYTES if self._throttle.bytes_per_s else len(into)
        for begin in range(0, len(into), max(piece_bytes, 1)):
            piece = into[begin : begin + piece_bytes]
            await self._throttle.take(len(piece))

            def arrived(size_bytes: int, begin: int = begin) -> None:
                on_bytes(begin + size_bytes)

            await self._source.read(url, shard, version, offset + begin, piece, arrived)

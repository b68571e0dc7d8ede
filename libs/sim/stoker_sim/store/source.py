"""Where models come from: one source for all nodes, which may be away, break off, or give wrong bytes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from stoker_core.errors import RefusedCheckpoint, SourceUnavailable
from stoker_sim.dice import Dice
from stoker_sim.store.contents import Library
from stoker_sim.store.faults import NONE, Faults
from stoker_sim.store.flaws import Flaws
from stoker_storeagent.ports import Inspected, OnBytes

PIECE_S = 0.004
PIECES_MAX = 5


class SourceState:
    """What all nodes see of it. read_bytes: by node and model, of what arrived."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.faults: Faults = NONE
        self.away = False
        self.read_bytes: Counter[tuple[str, str]] = Counter()


class SimSource:
    """Implements ports.Source for one run of an agent."""

    kind = "sim"

    def __init__(self, node: str, state: SourceState, dice: Dice, flaws: Flaws, streams: Callable[[str], bool]) -> None:
        """streams: whether a model comes through windows, each of which fetches for itself."""
        self._node, self._state, self._dice, self._flaws, self._streams = node, state, dice, flaws, streams
        self._reading: Counter[tuple[str, str]] = Counter()

    async def inspect(self, url: str) -> Inspected:
        raise RefusedCheckpoint(url, "the catalogue has its manifest")

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        contents = self._state.library.by_source[url]
        key = (contents.model_id, shard)
        self._reading[key] += 1
        twice = self._reading[key] > 1 and not self._streams(contents.model_id)
        self._flaws.require(not twice, f"{self._node} fetches {key} twice at once")
        try:
            await self._read(contents.shards[contents.names.index(shard)], contents.bound, url, offset, into, on_bytes)
            self._state.read_bytes[self._node, contents.model_id] += len(into)
        finally:
            self._reading[key] -= 1

    async def _read(self, data: bytes, bound: bool, url: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        faults, dice = self._state.faults, self._dice
        # Of a model whose digests are not known yet nobody could tell.
        wrong = bound and dice.chance(faults.source_wrong)
        piece = -(-len(into) // dice.between(1, PIECES_MAX))
        done = 0
        while done < len(into):
            await asyncio.sleep(dice.delay_s(PIECE_S))
            if self._state.away or dice.chance(faults.source_breaks):
                raise SourceUnavailable(url, "it broke off")
            size = min(piece, len(into) - done)
            into[done : done + size] = data[offset + done : offset + done + size]
            if wrong:
                into[done] ^= 0xFF
            done += size
            on_bytes(done)

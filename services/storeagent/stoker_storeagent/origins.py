"""Where the chunks that a node lacks of a model may come from, best first, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stoker_contracts.control import LinkStatus, Located
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    NotHeld,
    RefusedCheckpoint,
    SourceDenied,
    SourceUnavailable,
    StokerError,
)
from stoker_core.logging import get_logger
from stoker_policy.sources import order_sources
from stoker_storeagent.ports import OnBytes, Peers, Source
from stoker_storeagent.rates import Meter
from stoker_storeagent.records import Checkpoint

log = get_logger("origins")

TRIES = 6
"""Of a chunk at one origin, with pauses that double; so an origin may be away for about 12 s."""
PAUSE_S = 0.2
PAUSE_MAX_S = 5.0
BEGINS_S = 2.0
BEGINS_POLL_S = 0.05


class Origin(Protocol):
    """tier, name: as observations and events say where bytes came from."""

    @property
    def tier(self) -> Tier: ...
    @property
    def name(self) -> str: ...
    @property
    def meter(self) -> Meter | None:
        """None: whoever reads on its behalf keeps one."""
        ...

    async def read(self, position: int, offset: int, into: memoryview, on_bytes: OnBytes) -> str:
        """Fill `into` with a chunk's bytes from `offset` on. Returns the digest that the origin knows for it, or nothing."""
        ...


class SourceOrigin:
    """The model's own source."""

    tier = Tier.REMOTE

    def __init__(self, source: Source, checkpoint: Checkpoint, meter: Meter) -> None:
        self._source, self._checkpoint = source, checkpoint
        self.name, self.meter = source.kind, meter

    async def read(self, position: int, offset: int, into: memoryview, on_bytes: OnBytes) -> str:
        shard, begin, _ = self._checkpoint.place(position)
        version = self._checkpoint.versions.get(shard, "")
        await self._source.read(self._checkpoint.source, shard, version, begin + offset, into, on_bytes)
        return ""


class PeerOrigin:
    tier = Tier.PEER
    meter = None

    def __init__(self, peers: Peers, located: Located, model_id: str) -> None:
        self._peers, self._located, self._model_id = peers, located, model_id
        self.name = located.node

    @property
    def upstream(self) -> tuple[str, ...]:
        return (self.name, *self._located.upstream)

    def blame(self, error: StokerError) -> None:
        self._peers.suspect(self.name, error.message)

    async def read(self, position: int, offset: int, into: memoryview, on_bytes: OnBytes) -> str:
        return await self._peers.read(self._located, self._model_id, position, offset, into, on_bytes)


class Origins:
    """Of one transfer. An origin that fails for good, or gives wrong bytes, is asked no more; the last error tells why none
    is left."""

    def __init__(self, found: Sequence[Origin], clock: Clock, jitter: Callable[[], float]) -> None:
        """jitter: a fresh number from 0 to 1."""
        self._left = list(found)
        self._clock, self._jitter = clock, jitter
        self._error: StokerError = SourceUnavailable("the model", "no source of it is known")

    @property
    def first(self) -> Origin | None:
        return self._left[0] if self._left else None

    @property
    def upstream(self) -> tuple[str, ...]:
        """Nodes that the bytes come through, nearest first."""
        return self._left[0].upstream if self._left and isinstance(self._left[0], PeerOrigin) else ()

    def give_up(self, origin: Origin, error: StokerError) -> None:
        self._error = error
        if origin in self._left:
            self._left.remove(origin)
            log.warning("origin_given_up", origin=origin.name, code=error.code, error=error.message)
            if isinstance(origin, PeerOrigin):
                origin.blame(error)

    async def read(
        self, position: int, done_bytes: int, buffer: memoryview, on_bytes: Callable[[int, Origin], None]
    ) -> tuple[Origin | None, str]:
        """Fill buffer[done_bytes:] with what the chunk has there. Returns whom it is from, and the chunk's digest if known.

        None: it is from several, so nobody knows whose bytes are the wrong ones if some are.
        on_bytes: told how much of the buffer is filled, and by whom the last of it was.
        Raises what the last origin raised when none is left.
        """
        missed, gave = set[Origin](), set[Origin]()
        tries = 0
        while True:
            origin = next((o for o in self._left if o not in missed), None)
            if origin is None:
                raise self._error
            began = done_bytes

            def arrived(size_bytes: int, began: int = began, origin: Origin = origin) -> None:
                nonlocal done_bytes
                if origin.meter is not None:
                    origin.meter.add(began + size_bytes - done_bytes, self._clock.monotonic_s())
                done_bytes = began + size_bytes
                on_bytes(done_bytes, origin)

            if origin.meter is not None:
                origin.meter.begin(self._clock.monotonic_s())
            try:
                said = await origin.read(position, began, buffer[began:], arrived)
                return (origin if gave <= {origin} else None), said
            except NotHeld as error:  # of this chunk alone
                self._error = error
                missed.add(origin)
                tries = 0
                continue
            except (SourceDenied, CheckpointChanged, CorruptCheckpoint, RefusedCheckpoint) as error:
                self.give_up(origin, error)
                tries = 0
                continue
            except SourceUnavailable as error:
                self._error = error
                tries = tries + 1 if done_bytes == began else 1
                if tries >= TRIES or origin.tier is Tier.PEER:
                    self.give_up(origin, error)
                    tries = 0
                    continue
            finally:
                if done_bytes != began:
                    gave.add(origin)
                if origin.meter is not None:
                    origin.meter.end(self._clock.monotonic_s())
            await self._clock.sleep(min(PAUSE_S * 2 ** (tries - 1), PAUSE_MAX_S) * (0.5 + 0.5 * self._jitter()))


class OriginFinder:
    """Knows all origins of this node. remote: what models' own sources gave together."""

    def __init__(
        self, node: str, source_of: Callable[[str], Source], peers: Peers, clock: Clock, jitter: Callable[[], float]
    ) -> None:
        """source_of: the kind of source that a URL means; raises RefusedCheckpoint."""
        self._node, self._source_of, self._peers = node, source_of, peers
        self._clock, self._jitter = clock, jitter
        self.remote = Meter()

    def links(self) -> tuple[LinkStatus, ...]:
        return self._peers.links()

    async def find(self, checkpoint: Checkpoint, wanted: Sequence[str] = ()) -> Origins:
        """wanted: nodes that somebody who sees more than we do named, best first. The model's own source comes last.

        The first of them may have been told to fetch the model just when we were: it gets a moment to begin.
        """
        until_s = self._clock.monotonic_s() + BEGINS_S
        while True:
            located = await self._peers.locate(checkpoint.model_id, wanted)
            if not wanted or any(peer.node == wanted[0] for peer in located) or self._clock.monotonic_s() >= until_s:
                break
            await self._clock.sleep(BEGINS_POLL_S)
        bandwidth = {link.peer: link.read_bytes_per_s for link in self._peers.links()}
        ordered = order_sources(self._node, located, wanted, bandwidth)
        found: list[Origin] = [PeerOrigin(self._peers, peer, checkpoint.model_id) for peer in ordered]
        try:
            found.append(SourceOrigin(self._source_of(checkpoint.source), checkpoint, self.remote))
        except RefusedCheckpoint:
            if not found:
                raise
        return Origins(found, self._clock, self._jitter)

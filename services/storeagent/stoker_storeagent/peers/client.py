"""Finds other nodes that have a model, and takes chunks from them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

from stoker_bus.port import Bus, Message, ask
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import LinkStatus, Locate, Located, LocateReply, StoreStatus
from stoker_contracts.events import TIER_PEER_SUSPECTED
from stoker_core.clock import Clock
from stoker_core.errors import BusError, DatabaseUnavailable, InvalidMessage, InvalidSettings, PeerFailed
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.peers.candidates import Heard
from stoker_storeagent.peers.link import KeptLinks, Link
from stoker_storeagent.peers.wire import Want
from stoker_storeagent.ports import Events, OnBytes
from stoker_storeagent.rates import Meter
from stoker_storeagent.throttle import Throttle

log = get_logger("peers")

LOCATE_S = 0.3
"""How long an answer may take: of the database, and then of all nodes at once."""
ASKED_MAX = 8
READS_MAX = 64
"""At once; further ones wait."""
READS_PER_PEER = 2
"""One more than has bytes on the way, so that none are lacking between two chunks. More would share the way, and each chunk
come the later: in a chain of nodes the next one waits for it."""
PRUNE_S = 5.0
METERS_MAX = 1024

Placements = Callable[[str], Awaitable[list[str]]]
"""Nodes that have a model as the database knows it. May raise DatabaseUnavailable."""


class PeerClient:
    """Implements `ports.Peers`."""

    def __init__(
        self,
        bus: Bus,
        placements: Placements,
        events: Events,
        *,
        node: str,
        token: str,
        throttle: Throttle,
        clock: Clock,
        suspects_s: float = 60.0,
        stall_s: float = 10.0,
        wait_s: float = 5.0,
    ) -> None:
        """suspects_s: how long a peer that failed is not asked again.  stall_s: how long one may send nothing.

        wait_s: how long to wait for a chunk that is on its way to the peer.
        Raises InvalidSettings without a token.
        """
        if not token:
            raise InvalidSettings("peers give chunks only to those who have the cluster token")
        self._bus, self._placements, self._events, self._clock = bus, placements, events, clock
        self._node, self._token, self._throttle = node, token, throttle
        self._suspects_s, self._stall_s, self._wait_s = suspects_s, stall_s, wait_s
        self._heard = Heard(clock, node=node)
        self._kept = KeptLinks(clock)
        self._slots = asyncio.Semaphore(READS_MAX)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those of peers in use
        self._suspects: dict[str, float] = {}  # node → until when
        self._meters: dict[str, Meter] = {}

    def part(self) -> Part:
        """Hears what other nodes hold, and closes connections that nobody needs any more."""
        return Part("peers_out", self._run)

    async def _run(self) -> None:
        subscription = await self._bus.subscribe(subjects.STATUS_STORE_ALL, self._on_status)
        try:
            while True:
                await self._clock.sleep(PRUNE_S)
                self._kept.prune()
        finally:
            self._kept.close()
            await subscription.stop()

    async def _on_status(self, message: Message) -> None:
        self.hear(decode(StoreStatus, message.data))

    def hear(self, status: StoreStatus) -> None:
        if status.node != self._node:
            self._heard.offer(status)

    @property
    def suspected(self) -> frozenset[str]:
        """Nodes that are not located now."""
        now_s = self._clock.monotonic_s()
        self._suspects = {node: until_s for node, until_s in self._suspects.items() if until_s > now_s}
        return frozenset(self._suspects)

    def suspect(self, node: str, reason: str) -> None:
        """Do not locate a peer for suspects_s: it failed, or what it gave was wrong."""
        known = node in self.suspected
        self._suspects[node] = self._clock.monotonic_s() + self._suspects_s
        self._kept.forget(node)
        if not known:
            log.warning("peer_suspected", peer=node, reason=reason, for_s=self._suspects_s)
            self._events.emit(TIER_PEER_SUSPECTED, node, peer=node, by=self._node, reason=reason)

    def links(self) -> tuple[LinkStatus, ...]:
        """What was seen of the ways to peers since the start, by node."""
        return tuple(
            LinkStatus(peer=peer, read_bytes_per_s=meter.bytes_per_s, read_bytes=meter.total_bytes)
            for peer, meter in sorted(self._meters.items())
        )

    async def locate(self, model_id: str, wanted: Sequence[str] = ()) -> list[Located]:
        """As in `ports.Peers`. Takes up to twice LOCATE_S; who answers later is left out."""
        suspected = self.suspected
        candidates = [*wanted, *self._heard.candidates(model_id, await self._placed(model_id))]
        nodes = [node for node in dict.fromkeys(candidates) if node not in suspected and node != self._node]
        answers = await asyncio.gather(*(self._ask(node, model_id) for node in nodes[:ASKED_MAX]))
        suspected = self.suspected
        return sorted(
            (found for found in answers if found is not None and found.node not in suspected), key=lambda at: at.node
        )

    async def _placed(self, model_id: str) -> list[str]:
        try:
            async with asyncio.timeout(LOCATE_S):
                return await self._placements(model_id)
        except (DatabaseUnavailable, TimeoutError) as error:
            log.debug("placements_unknown", model_id=model_id, error=str(error))
            return []

    async def _ask(self, node: str, model_id: str) -> Located | None:
        question = Locate(model_id=model_id, node=self._node)
        try:
            reply: Located | object = await ask(
                self._bus, subjects.store_locate(node), question, LocateReply, timeout_s=LOCATE_S
            )
        except (BusError, InvalidMessage) as error:
            log.debug("not_located", peer=node, model_id=model_id, error=error.message)
            return None
        if not isinstance(reply, Located) or reply.node != node or not reply.address:
            return None
        return reply if reply.held_bytes > 0 or reply.receiving else None

    async def read(
        self, located: Located, model_id: str, position: int, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> str:
        """As in `ports.Peers`. A peer that fails is suspected from then on; one that has no room for us is only NotHeld."""
        want = Want(model_id=model_id, position=position, offset=offset, wait_ms=round(self._wait_s * 1000))
        turns = self._turns.setdefault(located.node, asyncio.Semaphore(READS_PER_PEER))
        known = located.node in self.suspected
        async with turns, self._slots:
            if not known and located.node in self.suspected:  # since we wait: nobody has to find that out again
                raise PeerFailed(located.node, "it failed a moment ago")
            try:
                return await self._read(located.node, located.address, want, into, on_bytes)
            except PeerFailed as error:
                self.suspect(located.node, error.reason)
                raise

    async def _read(self, peer: str, address: str, want: Want, into: memoryview, on_bytes: OnBytes) -> str:
        kept = self._kept.take(peer, address)
        if kept is not None:
            try:
                return await self._through(kept, peer, address, want, into, on_bytes)
            except PeerFailed:
                if not kept.stale:
                    raise
                self._kept.forget(peer)  # it may have started anew: then the others are as dead as this one
        link = await Link.open(peer, address, node=self._node, token=self._token, clock=self._clock)
        return await self._through(link, peer, address, want, into, on_bytes)

    async def _through(
        self, link: Link, peer: str, address: str, want: Want, into: memoryview, on_bytes: OnBytes
    ) -> str:
        try:
            return await link.read(
                want, into, on_bytes, throttle=self._throttle, stall_s=self._stall_s, meter=self._meter(peer)
            )
        finally:
            if link.usable:
                self._kept.put(peer, address, link)
            else:
                link.close()

    def _meter(self, peer: str) -> Meter:
        meter = self._meters.pop(peer, None) or Meter()
        self._meters[peer] = meter  # the latest used are last
        if len(self._meters) > METERS_MAX:
            del self._meters[next(iter(self._meters))]
        return meter

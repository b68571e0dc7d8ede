"""Simulated nodes as one another's peers: what one's `Giving` gives arrives at the other, piece by piece, or breaks off."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stoker_contracts.control import LinkStatus, Located
from stoker_core.errors import NotHeld, PeerFailed, StokerError
from stoker_sim.dice import Dice
from stoker_sim.loop import Process, SimLoop
from stoker_sim.store.faults import NONE, Faults
from stoker_storeagent.ports import OnBytes, Served

ANSWER_S = 0.3
WAIT_S = 5.0
SUSPECT_S = 30.0
STALL_S = 10.0
HOP_S = 0.002
PIECES_MAX = 4


class Peer(Protocol):
    """A node's storage agent while it runs."""

    @property
    def process(self) -> Process: ...
    @property
    def giving(self) -> Served: ...


@dataclass
class Wire:
    """peers: by node, those that run now."""

    loop: SimLoop
    peers: Mapping[str, Peer]
    faults: Faults = NONE


@dataclass
class _Stream:
    """One chunk on its way. pieces: at most two; None: no more come, because of `error`."""

    pieces: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(2))
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    digest: str = ""
    error: StokerError | None = None


class SimPeers:
    """Implements ports.Peers for one run of an agent."""

    def __init__(self, node: str, process: Process, wire: Wire, dice: Dice) -> None:
        """process: of the agent that asks."""
        self._node, self._process, self._wire, self._dice = node, process, wire, dice
        self._suspects: dict[str, float] = {}

    def links(self) -> tuple[LinkStatus, ...]:
        return ()

    def suspect(self, node: str, reason: str) -> None:
        self._suspects[node] = self._wire.loop.time() + SUSPECT_S

    async def locate(self, model_id: str, wanted: Sequence[str] = ()) -> list[Located]:
        """Everybody is asked, so `wanted` adds nobody."""
        now_s = self._wire.loop.time()
        nodes = [node for node in sorted(self._wire.peers) if node != self._node]
        asked = [node for node in nodes if self._suspects.get(node, 0.0) <= now_s]
        answers = await asyncio.gather(*(self._ask(node, model_id) for node in asked))
        return [found for found in answers if found is not None and (found.held_bytes or found.receiving)]

    async def read(
        self, located: Located, model_id: str, position: int, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> str:
        peer = self._wire.peers.get(located.node)
        await self._hop()
        if peer is None or not peer.process.alive:
            raise PeerFailed(located.node, "connection refused")
        stream = _Stream()
        lost = self._loses(peer.process, stream)
        serving = self._wire.loop.spawn(peer.process, self._serve(peer, model_id, position, offset, stream))

        def left() -> None:
            self._wire.loop.later(HOP_S, serving.cancel)  # it sees the connection end

        forget = self._process.on_death(left)
        try:
            return await self._receive(located.node, stream, into, on_bytes)
        finally:
            lost()
            forget()
            stream.taken.set()
            left()

    async def _ask(self, node: str, model_id: str) -> Located | None:
        await self._hop()
        peer = self._wire.peers.get(node)
        if peer is None or not peer.process.alive or self._dice.chance(self._wire.faults.peer_lost):
            await asyncio.sleep(ANSWER_S)
            return None
        answer: asyncio.Future[Located | None] = self._wire.loop.create_future()

        async def reply() -> None:
            found = peer.giving.located(model_id)

            def say() -> None:
                if not answer.done():
                    answer.set_result(found)

            self._wire.loop.later(self._dice.delay_s(HOP_S), say)

        self._wire.loop.spawn(peer.process, reply())
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            return None

    async def _receive(self, node: str, stream: _Stream, into: memoryview, on_bytes: OnBytes) -> str:
        done = 0
        while True:
            try:
                async with asyncio.timeout(WAIT_S + STALL_S):
                    piece = await stream.pieces.get()
            except TimeoutError as error:
                raise PeerFailed(node, "nothing came") from error
            await self._hop()
            if piece is None:
                break
            if self._dice.chance(self._wire.faults.peer_breaks):
                raise PeerFailed(node, "the connection broke")
            into[done : done + len(piece)] = piece
            done += len(piece)
            on_bytes(done)
        if stream.error is not None:
            raise stream.error
        if done != len(into):
            raise PeerFailed(node, f"{done} bytes came where {len(into)} belong")
        return stream.digest

    async def _serve(self, peer: Peer, model_id: str, position: int, offset: int, stream: _Stream) -> None:
        try:
            async with peer.giving.chunk(model_id, position, wait_s=WAIT_S) as served:
                stream.digest = served.digest
                size = served.size_bytes - offset
                flip = self._dice.chance(self._wire.faults.peer_wrong)
                piece = -(-size // self._dice.between(1, PIECES_MAX))
                for begin in range(0, size, piece):
                    data = os.pread(served.fd, min(piece, size - begin), served.offset_bytes + offset + begin)
                    if flip:
                        data = bytes([data[0] ^ 0x10]) + data[1:]
                    await stream.pieces.put(data)
                    await self._hop()
                await stream.pieces.put(None)
                await stream.taken.wait()
        except NotHeld as error:
            stream.error = error
            await stream.pieces.put(None)

    def _loses(self, process: Process, stream: _Stream) -> Callable[[], None]:
        """Tell the client if the server dies. Returns what takes that back."""

        def died() -> None:
            stream.error = PeerFailed("peer", "the connection was reset")
            while not stream.pieces.empty():
                stream.pieces.get_nowait()
            stream.pieces.put_nowait(None)

        def reset() -> None:
            self._wire.loop.later(HOP_S, died)

        return process.on_death(reset)

    async def _hop(self) -> None:
        await asyncio.sleep(self._dice.delay_s(HOP_S))

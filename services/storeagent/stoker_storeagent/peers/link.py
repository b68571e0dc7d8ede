"""One connection to another node's storage agent, and those that are kept for the next chunk."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from contextlib import suppress
from typing import Self

from stoker_core.clock import Clock
from stoker_core.errors import PeerFailed
from stoker_storeagent.peers import sockets
from stoker_storeagent.peers.wire import NONCE_BYTES, ClientSide, Have, Missing, Want, Welcome, failure
from stoker_storeagent.ports import OnBytes
from stoker_storeagent.rates import Meter
from stoker_storeagent.throttle import Throttle

CONNECT_S = 5.0
KEPT_PER_PEER = 4
KEPT_MAX = 64
KEPT_S = 30.0


class Link:
    """Authenticated. One read at a time."""

    def __init__(self, connection: socket.socket, side: ClientSide, clock: Clock) -> None:
        self._connection, self._side, self._clock = connection, side, clock
        self.stale = False
        """Whether the last read found that the peer had hung up."""
        self.usable = True
        """Whether there can be another read: not after one that was broken off."""

    @classmethod
    async def open(cls, peer: str, address: str, *, node: str, token: str, clock: Clock) -> Self:
        """Raises PeerFailed within CONNECT_S, NotHeld if the peer takes no more connections."""
        side = ClientSide(node=node, peer=peer, token=token, nonce=os.urandom(NONCE_BYTES))
        connection: socket.socket | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await _connect(address)
                said: object = b""
                while not isinstance(said, Welcome):
                    said = await sockets.next_message(connection, side)
                    if isinstance(said, bytes):
                        await sockets.send(connection, said, stall_s=CONNECT_S)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                raise PeerFailed(peer, f"no answer at {address} within {CONNECT_S:g} s") from error
            if isinstance(error, OSError | ValueError):
                raise PeerFailed(peer, f"{address}: {error}") from error
            raise
        return cls(connection, side, clock)

    async def read(
        self, want: Want, into: memoryview, on_bytes: OnBytes, *, throttle: Throttle, stall_s: float, meter: Meter
    ) -> str:
        """Fill `into` with what is wanted; returns the chunk's digest. Raises NotHeld, PeerFailed."""
        peer = self._side.peer
        self.stale = self.usable = False
        answered = False
        try:
            await sockets.send(self._connection, self._side.want(want), stall_s=stall_s)
            async with asyncio.timeout(want.wait_ms / 1000 + stall_s):
                said = await sockets.next_message(self._connection, self._side)
            answered = True
            if isinstance(said, Missing):
                self.usable = True
                raise failure(peer, said)
            assert isinstance(said, Have)
            if said.size_bytes != len(into):
                raise PeerFailed(peer, f"offers {said.size_bytes} bytes where {len(into)} belong")
            await self._receive(into, on_bytes, throttle, stall_s, meter)
        except TimeoutError as error:
            raise PeerFailed(peer, f"nothing came for {stall_s:g} s") from error
        except OSError as error:
            self.stale = not answered
            raise PeerFailed(peer, str(error)) from error
        with suppress(OSError):  # what was wanted is here, whatever the peer may have come to by now
            await sockets.send(self._connection, self._side.taken(), stall_s=stall_s)
            self.usable = True
        return said.digest

    async def _receive(
        self, into: memoryview, on_bytes: OnBytes, throttle: Throttle, stall_s: float, meter: Meter
    ) -> None:
        before = 0

        def came(done: int) -> None:
            nonlocal before
            meter.add(done - before, self._clock.monotonic_s())
            before = done
            on_bytes(done)

        meter.begin(self._clock.monotonic_s())
        try:
            await sockets.receive_into(self._connection, into, came, throttle=throttle, stall_s=stall_s)
        finally:
            meter.end(self._clock.monotonic_s())

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()


async def _connect(address: str) -> socket.socket:
    """address: host:port, or [host]:port. Raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    failed: OSError = OSError("no such host")
    for family, kind, protocol, _, resolved in await loop.getaddrinfo(
        host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM
    ):
        connection = socket.socket(family, kind, protocol)
        try:
            sockets.prepare(connection)
            await loop.sock_connect(connection, resolved)
        except OSError as error:
            connection.close()
            failed = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failed


class KeptLinks:
    """Links that nobody uses: at most KEPT_PER_PEER for each peer and KEPT_MAX in all, and none longer than KEPT_S."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[tuple[float, str, str, Link]] = deque()  # the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, peer: str, address: str) -> Link | None:
        """The one that was used last: of all it is the most likely to live."""
        self.prune()
        for at in reversed(range(len(self._kept))):
            _, node, where, link = self._kept[at]
            if (node, where) == (peer, address):
                del self._kept[at]
                return link
        return None

    def put(self, peer: str, address: str, link: Link) -> None:
        self._kept.append((self._clock.monotonic_s(), peer, address, link))
        of_peer = [entry for entry in self._kept if entry[1] == peer]
        if len(of_peer) > KEPT_PER_PEER:
            self._drop(of_peer[0])
        elif len(self._kept) > KEPT_MAX:
            self._drop(self._kept[0])

    def forget(self, peer: str) -> None:
        """Close all of one peer."""
        for entry in [entry for entry in self._kept if entry[1] == peer]:
            self._drop(entry)

    def prune(self) -> None:
        """Close those that were kept for too long."""
        since_s = self._clock.monotonic_s() - KEPT_S
        while self._kept and self._kept[0][0] <= since_s:
            self._drop(self._kept[0])

    def close(self) -> None:
        while self._kept:
            self._drop(self._kept[0])

    def _drop(self, entry: tuple[float, str, str, Link]) -> None:
        self._kept.remove(entry)
        entry[3].close()

"""Gives chunks to other nodes' storage agents: those that are here, and those on their way once they have come."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import OrderedDict
from contextlib import AsyncExitStack
from functools import partial

from stoker_core.clock import Clock
from stoker_core.errors import (
    InvalidMessage,
    InvalidRequest,
    InvalidSettings,
    Overloaded,
    PortTaken,
    StokerError,
    Stopping,
)
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.peers import sockets
from stoker_storeagent.peers.complaints import Complaints
from stoker_storeagent.peers.usage import Usage
from stoker_storeagent.peers.wire import NONCE_BYTES, Auth, Denied, Said, ServerSide, Want
from stoker_storeagent.ports import Served, ServedChunk
from stoker_storeagent.threads import Threads
from stoker_storeagent.throttle import Throttle

log = get_logger("peers")

HANDSHAKE_S = 5.0
IDLE_S = 60.0
STALL_S = 30.0
WAIT_S_MAX = 60.0
"""How long a client may have the server wait for a chunk."""
HANDSHAKES_MAX = 32
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
RETRY_AFTER_MS = 500
DISK_THREADS = 4
_ANY_HOST = frozenset({"", "0.0.0.0", "::"})


class PeerServer:
    """A task for each connection: at most connections_max that are proven, and HANDSHAKES_MAX that are not yet.

    For a further one the oldest that has nothing in hand has to go; those that are proven are refused if there is none.
    """

    def __init__(
        self,
        served: Served,
        *,
        node: str,
        token: str,
        host: str,
        port: int,
        throttle: Throttle,
        clock: Clock,
        advertise: str = "",
        connections_max: int = 64,
        handshake_s: float = HANDSHAKE_S,
        idle_s: float = IDLE_S,
        stall_s: float = STALL_S,
    ) -> None:
        """port: 0 takes a free one.  advertise: the host that peers are told; empty: `host`.

        handshake_s, idle_s: how long a client may take to prove itself, and to want something.
        stall_s: how long it may take nothing of what it is sent.
        Raises InvalidSettings without a token, or for a host that no peer can be told.
        """
        if not token:
            raise InvalidSettings("chunks are given to peers only with a cluster token")
        if not advertise and host in _ANY_HOST:
            raise InvalidSettings(f"peers cannot be told {host!r} as this node's address: name the host they shall use")
        self._served, self._node, self._token = served, node, token
        self._host, self._port, self._advertise = host, port, advertise or host
        self._connections_max = connections_max
        self._handshake_s, self._idle_s, self._stall_s = handshake_s, idle_s, stall_s
        self._threads = Threads(DISK_THREADS, "peers")
        self._sending = sockets.Sending(self._threads, throttle, stall_s=stall_s)
        self._usage = Usage(clock)
        self._complaints = Complaints(clock)
        self._listener: socket.socket | None = None
        self._unproven: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._resting: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._proven = 0
        self._stopping = False

    @property
    def address(self) -> str:
        """host:port for peers; empty unless it listens."""
        if self._listener is None:
            return ""
        host = f"[{self._advertise}]" if ":" in self._advertise else self._advertise
        return f"{host}:{self._listener.getsockname()[1]}"

    @property
    def serving(self) -> int:
        """Nodes that take chunks of a model now, for each model."""
        return self._usage.serving

    def part(self) -> Part:
        """On a stop what was wanted before is given, and nothing else."""
        return Part("peers_in", self._run, stop_intake=self._stop, drain=self._usage.idle)

    def listen(self) -> None:
        """No-op if it listens already. Raises PortTaken, and InvalidSettings for a host that is not this node's."""
        if self._listener is not None:
            return
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self._port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(self._port, "peers", "STOKER_STOREAGENT_PEER_PORT") from error
            raise InvalidSettings(f"peers cannot be heard on {self._host}, port {self._port}: {error}") from error
        listener.setblocking(False)
        self._listener = listener
        log.info("peers_heard", address=self.address)

    async def _run(self) -> None:
        self.listen()
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        connection, address = await loop.sock_accept(self._listener)
                    except OSError as error:  # out of descriptors: others will give theirs back
                        log.warning("not_accepted", error=str(error))
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                        continue
                    task = group.create_task(self._connection(connection, address[0]))
                    task.add_done_callback(partial(self._ended, connection))
                    if len(self._unproven) == HANDSHAKES_MAX:
                        self._unproven.popitem(last=False)[0].cancel()
                    self._unproven[task] = None
        finally:
            self._listener.close()
            self._listener = None
            self._threads.close()

    def _stop(self) -> None:
        self._stopping = True

    def _ended(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        # Here and not in the task: one that is cancelled before its first step does not run at all.
        self._unproven.pop(task, None)
        connection.close()

    async def _connection(self, connection: socket.socket, address: str) -> None:
        side = ServerSide(node=self._node, token=self._token, nonce=os.urandom(NONCE_BYTES))
        try:
            sockets.prepare(connection)
            if await self._prove(connection, side, address):
                self._proven += 1
                try:
                    await self._converse(connection, side)
                finally:
                    self._proven -= 1
        except InvalidMessage as error:
            self._complaints.about(address, error.message, node=side.client)
        except TimeoutError:
            log.debug("peer_silent", address=address, node=side.client)
        except ConnectionError as error:
            log.debug("peer_gone", address=address, node=side.client, error=str(error))
        except (OSError, StokerError) as error:  # of the file that was to be sent
            log.warning("chunk_not_given", node=side.client, error=str(error))

    async def _prove(self, connection: socket.socket, side: ServerSide, address: str) -> bool:
        """Whether it is a peer, and may stay."""
        if self._stopping:
            await self._refuse(connection, side, Stopping())
            return False
        async with asyncio.timeout(self._handshake_s):
            await sockets.send(connection, side.hello(), stall_s=self._handshake_s)
            said = await sockets.next_message(connection, side)
        if not isinstance(said, Auth):
            reason = said.reason if isinstance(said, Denied) else "it did not prove itself"
            self._complaints.about(address, reason)
            await sockets.send(connection, side.refuse("unauthenticated", reason), stall_s=self._stall_s)
            return False
        task = asyncio.current_task()
        assert task is not None
        self._unproven.pop(task, None)
        if self._proven >= self._connections_max:
            if not self._resting:
                await self._refuse(connection, side, Overloaded(self._node, retry_after_ms=RETRY_AFTER_MS))
                return False
            self._resting.popitem(last=False)[0].cancel()
        await sockets.send(connection, side.welcome(), stall_s=self._stall_s)
        return True

    async def _refuse(self, connection: socket.socket, side: ServerSide, error: StokerError) -> None:
        await sockets.send(connection, side.refuse(error.code, error.message), stall_s=self._stall_s)

    async def _converse(self, connection: socket.socket, side: ServerSide) -> None:
        said: Said | None = None
        while True:
            if isinstance(said, Want):
                with self._usage.taking(said.model_id, side.client):
                    said = await self._give(connection, side, said)
            else:  # at first, and after a Taken or a Missing
                said = await self._rest(connection, side)

    async def _rest(self, connection: socket.socket, side: ServerSide) -> Said:
        task = asyncio.current_task()
        assert task is not None
        self._resting[task] = None
        try:
            async with asyncio.timeout(self._idle_s):
                return await sockets.next_message(connection, side)
        finally:
            self._resting.pop(task, None)

    async def _give(self, connection: socket.socket, side: ServerSide, want: Want) -> Said | None:
        """Answer, and return what the client says next if it got a chunk: until then that is held."""
        async with AsyncExitStack() as held:
            try:
                chunk = await self._chunk(connection, want, held)
            except StokerError as error:
                await sockets.send(connection, side.missing(error), stall_s=self._stall_s)
                return None
            try:
                size_bytes = chunk.size_bytes - want.offset
                await sockets.send(connection, side.have(size_bytes, chunk.digest), stall_s=self._stall_s)
                await self._sending.send(connection, chunk.fd, chunk.offset_bytes + want.offset, size_bytes)
                async with asyncio.timeout(self._stall_s):
                    return await sockets.next_message(connection, side)
            except BaseException:
                sockets.abort(connection)  # before the chunk is let go
                raise

    async def _chunk(self, connection: socket.socket, want: Want, held: AsyncExitStack) -> ServedChunk:
        """What is wanted, once it is here; held by `held`. Raises NotHeld and other StokerErrors.

        Raises ConnectionResetError if the client leaves meanwhile, or does not wait for its answer.
        """
        if self._stopping:
            raise Stopping
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as waiting:

                def hear() -> None:
                    loop.remove_reader(connection)
                    waiting.reschedule(loop.time())

                loop.add_reader(connection, hear)
                try:
                    wait_s = min(want.wait_ms / 1000, WAIT_S_MAX)
                    chunk = await held.enter_async_context(
                        self._served.chunk(want.model_id, want.position, wait_s=wait_s)
                    )
                finally:
                    loop.remove_reader(connection)
        except TimeoutError as error:
            raise ConnectionResetError(errno.ECONNRESET, "it left while it waited for a chunk") from error
        if want.offset >= chunk.size_bytes:
            raise InvalidRequest(f"the chunk has {chunk.size_bytes} bytes, none at {want.offset}", "offset")
        return chunk

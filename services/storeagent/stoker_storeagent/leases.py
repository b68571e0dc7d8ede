"""The node's Unix socket: instances ask for a model here, and hold it for as long as they stay connected."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from pathlib import Path

from stoker_contracts.codec import decode, encode
from stoker_contracts.storage import (
    LINE_LIMIT_BYTES,
    LeaseGranted,
    LeaseProgress,
    LeaseRefused,
    LeaseRequest,
    LeaseUsed,
)
from stoker_core import unix
from stoker_core.errors import InvalidMessage, Overloaded, StokerError, Stopping
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_core.unix import Connection, accept, close
from stoker_db.ports import LoadObservation
from stoker_storeagent.ports import Held, Store

log = get_logger("leases")

REQUEST_S = 10.0
"""How long a new connection may take to say what it wants."""
BACKLOG = 128
RETRY_AFTER_MS = 500
READ_BYTES_MAX = (1 << 63) - 1


def listen(path: Path) -> socket.socket:
    """The node's socket. Raises InvalidSettings if another storage agent listens there, or if it cannot be."""
    return unix.listen(path, setting="STOKER_STOREAGENT_SOCKET", who="storage agent", backlog=BACKLOG)


class LeaseServer:
    """One task per connection, at most leases_max; further ones are refused at once."""

    def __init__(
        self,
        store: Store,
        listener: socket.socket,
        *,
        node: str,
        leases_max: int,
        observe: Callable[[LoadObservation], None],
        changed: Callable[[], None],
    ) -> None:
        """observe: told what a load took.  changed: told when a lease begins or ends."""
        self._store, self._listener, self._node = store, listener, node
        self._leases_max = leases_max
        self._observe, self._changed = observe, changed
        self._open = 0
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    def part(self) -> Part:
        """On a stop new connections are refused, and leases may end by themselves until the time to drain is over."""
        return Part("leases", self._run, stop_intake=self._stop, drain=self._drained)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    connection = await accept(self._listener)
                    self._open += 1
                    self._idle.clear()
                    task = group.create_task(self._connection(connection))
                    task.add_done_callback(self._closed)
        finally:
            close(self._listener)

    def _stop(self) -> None:
        self._stopping = True

    async def _drained(self) -> None:
        await self._idle.wait()

    def _closed(self, _: asyncio.Task[None]) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()

    async def _connection(self, accepted: socket.socket) -> None:
        connection = Connection(accepted, line_bytes_max=LINE_LIMIT_BYTES)
        try:
            await self._serve(connection)
        except StokerError as error:
            # A message may quote file names, which need not be valid text.
            message = error.message.encode("utf-8", "backslashreplace").decode()
            try:
                refused = LeaseRefused(code=error.code, message=message, retryable=error.retryable)
                await connection.send(encode(refused))
            except OSError:
                log.debug("refusal_unheard", code=error.code)
        except OSError as error:
            log.debug("client_gone", error=str(error))
        finally:
            connection.close()

    async def _serve(self, connection: Connection) -> None:
        if self._stopping:
            raise Stopping
        if self._open > self._leases_max:
            raise Overloaded("the storage agent", retry_after_ms=RETRY_AFTER_MS)
        try:
            async with asyncio.timeout(REQUEST_S):
                line = await connection.line()
        except TimeoutError as error:
            raise InvalidMessage(f"no request within {REQUEST_S:g} s") from error
        if not line:
            return
        request: LeaseRequest = decode(LeaseRequest, line)

        async def progress(done_bytes: int, total_bytes: int) -> None:
            connection.check()
            await connection.send(encode(LeaseProgress(done_bytes=done_bytes, total_bytes=total_bytes)))

        wanted = self._store.lease(request.model_id, request.instance_id, progress, device=request.device)
        async with wanted as held:
            log.info(
                "leased",
                model_id=held.model_id,
                instance_id=request.instance_id,
                source=held.source,
                origin=held.origin,
                ring=held.ring,
            )
            self._changed()
            try:
                await self._hold(connection, held)
            finally:
                log.info("lease_ended", model_id=held.model_id, instance_id=request.instance_id)
        self._changed()

    async def _hold(self, connection: Connection, held: Held) -> None:
        granted = LeaseGranted(
            path=str(held.path),
            source=held.source,
            origin=held.origin,
            total_bytes=held.total_bytes,
            wait_ms=held.wait_ms,
            ring=held.ring,
        )
        await connection.send(encode(granted), held.descriptors)
        line = await connection.line()
        if not line:
            return
        self._used(held, decode(LeaseUsed, line))
        if await connection.line():
            raise InvalidMessage("nothing follows LeaseUsed but the end of the connection")

    def _used(self, held: Held, used: LeaseUsed) -> None:
        if not (0 <= used.read_bytes <= READ_BYTES_MAX and 0 <= used.load_ms < math.inf):
            raise InvalidMessage("LeaseUsed: load_ms and read_bytes must not be negative nor out of range")
        self._store.observe_load(held, used.read_bytes, used.load_ms)
        self._observe(
            LoadObservation(
                model_id=held.model_id,
                node=self._node,
                source=held.source,
                origin=held.origin,
                read_bytes=used.read_bytes,
                load_ms=used.load_ms,
                wait_ms=held.wait_ms,
            )
        )

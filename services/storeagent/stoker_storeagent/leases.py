"""The node's Unix socket: instances ask for a model here, and hold it for as long as they stay connected."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from stoker_contracts.codec import decode
from stoker_contracts.storage import LeaseGranted, LeaseProgress, LeaseRefused, LeaseRequest, LeaseUsed
from stoker_core.errors import InvalidMessage, InvalidSettings, Overloaded, StokerError, Stopping
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_db.ports import LoadObservation
from stoker_storeagent.connection import Connection
from stoker_storeagent.ports import Held, Store

log = get_logger("leases")

REQUEST_S = 10.0
"""How long a new connection may take to say what it wants."""
PROBE_S = 1.0
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
RETRY_AFTER_MS = 500
READ_BYTES_MAX = (1 << 63) - 1


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user may use. A socket file that nobody listens on any more is replaced.

    Raises InvalidSettings if somebody listens there, or if something else has that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise InvalidSettings(f"STOKER_STOREAGENT_SOCKET: {path} is no socket; it is left as it is")
    if path.exists() and _answers(path):
        raise InvalidSettings(f"STOKER_STOREAGENT_SOCKET: another storage agent listens on {path}")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    os.fchmod(listener.fileno(), 0o600)  # before bind: the file has this mode from its first moment
    listener.bind(str(path))
    listener.listen(BACKLOG)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (TimeoutError, BlockingIOError):  # it listens, and is too busy to accept
            return True
        return True


def close(listener: socket.socket) -> None:
    """Stop listening and remove the socket's file."""
    # The file first: as long as this one listens nobody puts another in its place.
    Path(listener.getsockname()).unlink(missing_ok=True)
    listener.close()


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
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        connection, _ = await loop.sock_accept(self._listener)
                    except OSError as error:  # out of descriptors: others will give theirs back
                        log.warning("not_accepted", error=str(error))
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                        continue
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
        connection = Connection(accepted)
        try:
            await self._serve(connection)
        except StokerError as error:
            # A message may quote file names, which need not be valid text.
            message = error.message.encode("utf-8", "backslashreplace").decode()
            try:
                await connection.send(LeaseRefused(code=error.code, message=message, retryable=error.retryable))
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
            await connection.send(LeaseProgress(done_bytes=done_bytes, total_bytes=total_bytes))

        wanted = self._store.lease(request.model_id, progress, weights=request.weights, device=request.device)
        async with wanted as held:
            log.info(
                "leased", model_id=held.model_id, instance_id=request.instance_id, source=held.source, ring=held.ring
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
            total_bytes=held.total_bytes,
            wait_ms=held.wait_ms,
            ring=held.ring,
        )
        await connection.send(granted, held.descriptors)
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
                read_bytes=used.read_bytes,
                load_ms=used.load_ms,
                wait_ms=held.wait_ms,
            )
        )

"""The agent's end of the connection to its worker, who keeps the pool's descriptors for the agent that comes next."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stoker_contracts.codec import decode, encode
from stoker_contracts.keeping import (
    DESCRIPTORS,
    LINE_LIMIT_BYTES,
    Drop,
    FromKeeper,
    Keep,
    KeeperHello,
    Keeping,
    Kept,
    Loaded,
)
from stoker_core.clock import Clock
from stoker_core.errors import InvalidMessage
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_core.unix import Connection
from stoker_storeagent.orphans import Orphan, Orphans

log = get_logger("keep")

RETRY_S = 1.0
ANSWER_S = 5.0

_NOBODY = (FileNotFoundError, ConnectionRefusedError)


@dataclass(frozen=True)
class Taken:
    """What the agent before this one left. loading: ids of instances that are starting.

    Its descriptors are the caller's: `Pool.adopt` and `PoolTable.adopt` copy them, then `close` is due.
    """

    loading: tuple[str, ...]
    pool_fd: int
    table_fd: int

    def close(self) -> None:
        os.close(self.pool_fd)
        os.close(self.table_fd)


class PoolKeep:
    """First `take`, then perhaps `drop`, then `part`, each at most once; or `close`, which is idempotent."""

    def __init__(self, path: Path, *, boot_id: str, clock: Clock, jitter: Callable[[], float]) -> None:
        """path: of the worker's socket.  boot_id: of this process.  jitter: a fresh number from 0 to 1."""
        self._path, self._boot_id, self._clock, self._jitter = path, boot_id, clock, jitter
        self._connection: Connection | None = None

    async def take(self, *, timeout_s: float) -> Taken | None:
        """None if there is no worker, which shows at once; if it keeps nothing; or if it does not answer within timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                self._connection, kept, descriptors = await self._greet()
        except _NOBODY:
            log.info("no_worker", path=str(self._path))
            return None
        except (OSError, InvalidMessage) as error:
            log.warning("worker_silent", error=str(error) or type(error).__name__)
            return None
        return Taken(kept.loading, *descriptors) if descriptors else None

    async def drop(self) -> None:
        """What was taken is of no use: the worker lets go of it, so that its memory is free once nobody else maps it."""
        if self._connection is None:
            return
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._connection.send(encode(Drop()))
                # Who has loaded by now does not matter: nobody will write to that pool.
                while not isinstance(await _message(self._connection), Keeping):
                    pass
        except (OSError, InvalidMessage) as error:
            log.warning("not_dropped", error=str(error) or type(error).__name__)
            self.close()

    def part(self, descriptors: tuple[int, int], orphans: Orphans, released: Callable[[list[Orphan]], None]) -> Part:
        """Keeps the worker supplied for as long as it runs, and learns from it of orphans' ends.

        descriptors: of the pool (writable) and of its table, open for as long as this runs.  orphans: those of what was
        taken; without anything taken, none.  released: told of holds that ended; must not block.
        """
        return Part("keep", lambda: self._run(descriptors, orphans, released))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _run(
        self, descriptors: tuple[int, int], orphans: Orphans, released: Callable[[list[Orphan]], None]
    ) -> None:
        try:
            while True:
                try:
                    if self._connection is None:
                        _tell(released, await self._reconnect(orphans))
                    await self._attend(descriptors, orphans, released)
                except _NOBODY:
                    orphans.worker_lost(self._clock.monotonic_s())
                except (OSError, InvalidMessage) as error:
                    log.warning("worker_lost", error=str(error) or type(error).__name__)
                self.close()
                _tell(released, orphans.expired(self._clock.monotonic_s()))
                await self._clock.sleep(RETRY_S * (0.8 + 0.4 * self._jitter()))
        finally:
            self.close()

    async def _reconnect(self, orphans: Orphans) -> list[Orphan]:
        """Raises OSError, InvalidMessage."""
        try:
            async with asyncio.timeout(ANSWER_S):
                self._connection, kept, theirs = await self._greet()
        except _NOBODY:
            raise
        except (OSError, InvalidMessage):
            orphans.worker_seen()
            raise
        for descriptor in theirs:  # those of this very pool: the connection broke and the worker lives
            os.close(descriptor)
        return orphans.worker_back(kept.loading)

    async def _attend(
        self, descriptors: tuple[int, int], orphans: Orphans, released: Callable[[list[Orphan]], None]
    ) -> NoReturn:
        """Offer, and listen. Raises OSError or InvalidMessage when the connection ends."""
        connection = self._connection
        assert connection is not None
        async with asyncio.timeout(ANSWER_S):
            await connection.send(encode(Keep()), descriptors)
        while True:
            match await _message(connection):
                case Keeping():
                    log.info("pool_is_kept")
                case Loaded(instance_id=instance_id):
                    _tell(released, orphans.loaded(instance_id))
                case Kept():
                    raise InvalidMessage("Kept comes once")

    async def _greet(self) -> tuple[Connection, Kept, tuple[int, ...]]:
        """Raises FileNotFoundError or ConnectionRefusedError if nobody listens; other OSErrors and InvalidMessage if somebody
        does who does not answer."""
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(connecting, line_bytes_max=LINE_LIMIT_BYTES, descriptors_max=DESCRIPTORS)
        try:
            connecting.connect(str(self._path))  # never waits: it is non-blocking now, and this is no network
            await connection.send(encode(KeeperHello(boot_id=self._boot_id)))
            kept = await _message(connection)
            if not isinstance(kept, Kept):
                raise InvalidMessage(f"{type(kept).__name__} came in answer to KeeperHello")
            descriptors = connection.descriptors()
            expected = DESCRIPTORS if kept.kept else 0
            if len(descriptors) != expected:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise InvalidMessage(f"{len(descriptors)} descriptors came with Kept, not {expected}")
        except BaseException:
            connection.close()
            raise
        return connection, kept, descriptors


def _tell(released: Callable[[list[Orphan]], None], ended: list[Orphan]) -> None:
    if ended:
        log.info("orphans_ended", instances=sorted({orphan.instance_id for orphan in ended}))
        released(ended)


async def _message(connection: Connection) -> FromKeeper:
    """Raises ConnectionResetError at the end."""
    line = await connection.line()
    if not line:
        raise ConnectionResetError("the worker closed the connection")
    message: FromKeeper = decode(FromKeeper, line)
    return message

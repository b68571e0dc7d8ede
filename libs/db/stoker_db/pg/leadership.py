"""One scheduler leads: an advisory lock on a connection of its own, and the term that fences its holder."""

from __future__ import annotations

from typing import Any

import asyncpg

from stoker_core.errors import LeadershipLost
from stoker_db.pg.session import connect_directly, translated

# Any number would do that nobody else locks in this database: "STOKLEAD" in ASCII.
LOCK_KEY = 0x53544F4B4C454144

IDLE_LIMIT_MS = 2000
"""The server ends the lock's session after this long without a ping, so that a holder that is stuck loses it."""
CHECK_S = 1.0
"""How long a ping may take. With a ping every 0.5 s the holder knows before the server gives the lock away."""

_TAKE_TERM = "UPDATE leader SET term = term + 1, holder = $1, acquired_at = now() RETURNING term"


class PgLeadership:
    """Implements stoker_db.ports.Leadership."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Any = None

    async def acquire(self, leader_id: str) -> int | None:
        """Raises DatabaseUnavailable, and RuntimeError while this object leads already."""
        if self._connection is not None:
            raise RuntimeError("this object leads already")
        connection = await connect_directly(
            self._url,
            command_timeout_s=CHECK_S,
            application_name=f"stoker leader {leader_id}"[:63],
            idle_session_timeout=str(IDLE_LIMIT_MS),
        )
        try:
            with translated():
                if await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
                    term: int = await connection.fetchval(_TAKE_TERM, leader_id)
                    self._connection, connection = connection, None
                    return term
                return None
        finally:
            if connection is not None:
                await _close(connection)

    async def check(self) -> None:
        if self._connection is None:
            raise LeadershipLost
        try:
            await self._connection.execute("SELECT 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self._connection.terminate()
            self._connection = None
            raise LeadershipLost(f"the lock's connection is gone: {error or 'no answer'}") from error

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _close(connection)


async def _close(connection: Any) -> None:
    try:
        # Said aloud, because the server may notice the end of a connection later than the next candidate asks.
        await connection.execute("SELECT pg_advisory_unlock_all()")
        await connection.close(timeout=CHECK_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        pass  # it is closed already, and the lock with it
    finally:
        connection.terminate()

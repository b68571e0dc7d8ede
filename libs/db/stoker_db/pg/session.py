"""Transactions on a pool of connections, and the driver's errors in Stoker's own words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import msgspec
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from stoker_core.errors import DatabaseUnavailable, InvalidSettings

CONNECT_S = 5.0
COMMAND_S = 5.0
TRANSACTION_S = 10.0
"""A whole transaction, waiting for a connection of the pool included."""

# SQLSTATE classes and codes that say: not now. 08 connection, 53 resources (disk, memory, connections),
# 57P admin shutdown, crash, starting up; 57014 cancelled by a time limit; 25P03 idle for too long.
_UNAVAILABLE = ("08", "53", "57P", "57014", "25P03")
# Wrong user or password, no such database, or a server that lets nobody in from here: waiting does not help.
_REFUSED = ("28", "3D000")

_DRIVER_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, exc.DBAPIError, exc.TimeoutError)


def dsn(url: str) -> str:
    """`url` as asyncpg takes it. Raises InvalidSettings unless it is postgresql:// or postgresql+asyncpg://."""
    scheme, separator, rest = url.partition("://")
    if scheme not in ("postgresql", "postgresql+asyncpg") or not separator:
        raise InvalidSettings("STOKER_POSTGRES_URL: must begin with postgresql://")
    return f"postgresql://{rest}"


@contextmanager
def translated() -> Iterator[None]:
    """Raises DatabaseUnavailable for a connection that is refused, lost or silent, and InvalidSettings for a refused login.

    Other errors of the driver pass: they are mistakes of ours.
    """
    try:
        yield
    except _DRIVER_ERRORS as error:
        cause = error.orig.__cause__ if isinstance(error, exc.DBAPIError) and error.orig else error
        state = getattr(cause, "sqlstate", None) or ""
        if state.startswith(_REFUSED):
            raise InvalidSettings(f"STOKER_POSTGRES_URL: the server refuses: {cause}") from error
        # asyncpg's InterfaceErrors that are ValueErrors are bad arguments; the rest mean a closed connection.
        closed = isinstance(cause, asyncpg.InterfaceError) and not isinstance(cause, ValueError)
        silent = isinstance(cause, OSError | exc.TimeoutError)
        lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
        if closed or silent or lost or state.startswith(_UNAVAILABLE):
            reason = str(cause) or f"no answer within {TRANSACTION_S:g} s"
            raise DatabaseUnavailable(f"the database cannot be reached: {reason}") from error
        raise


async def connect_directly(url: str, *, command_timeout_s: float, **settings: str) -> Any:
    """One asyncpg connection outside any pool. settings: server settings. Raises as `translated` says."""
    with translated():
        try:
            return await asyncpg.connect(
                dsn(url), timeout=CONNECT_S, command_timeout=command_timeout_s, server_settings=settings
            )
        except ValueError as error:
            # Without the parser's own words: they may quote a piece of the password.
            raise InvalidSettings("STOKER_POSTGRES_URL: is no valid PostgreSQL URL") from error


class Session:
    """A pool of `pool_size` connections that heals by itself when the server returns."""

    def __init__(self, url: str, *, pool_size: int) -> None:
        async def connection() -> Any:
            return await connect_directly(
                url,
                command_timeout_s=COMMAND_S,
                application_name="stoker",
                # The server's own bounds: a process that is stopped in a transaction must not hold its locks, or the
                # next leader could not take the term.
                statement_timeout=f"{COMMAND_S:g}s",
                idle_in_transaction_session_timeout=f"{TRANSACTION_S:g}s",
            )

        self._engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connection,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=TRANSACTION_S,
            pool_pre_ping=True,  # a connection that died with the server is replaced before it is used
            json_serializer=lambda value: msgspec.json.encode(value).decode(),
            json_deserializer=msgspec.json.decode,
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Commits at the end of the block, rolls back if it raises. Raises as `translated` says."""
        with translated():
            async with asyncio.timeout(TRANSACTION_S), self._engine.begin() as connection:
                yield connection

    async def close(self) -> None:
        await self._engine.dispose()

"""The database as services see it."""

from __future__ import annotations

import asyncio
from typing import Self

from sqlalchemy import text

from stoker_core.errors import DatabaseUnavailable
from stoker_core.logging import get_logger
from stoker_db.pg.decisions import PgDecisions
from stoker_db.pg.instances import PgInstances
from stoker_db.pg.leadership import PgLeadership
from stoker_db.pg.models import PgModels
from stoker_db.pg.nodes import PgNodes
from stoker_db.pg.session import Session
from stoker_db.pg.tiers import PgTiers

log = get_logger("db")

_RETRY_S = 0.25


class PgDatabase:
    """Implements stoker_db.ports.Database. Survives restarts of the server: calls fail meanwhile and work again after."""

    def __init__(self, url: str, *, pool_size: int) -> None:
        self._url = url
        self._session = Session(url, pool_size=pool_size)
        self.models = PgModels(self._session)
        self.nodes = PgNodes(self._session)
        self.instances = PgInstances(self._session)
        self.decisions = PgDecisions(self._session)
        self.tiers = PgTiers(self._session)

    @classmethod
    async def connect(cls, url: str, *, pool_size: int = 5, timeout_s: float = 30.0) -> Self:
        """Return once a query is answered; a server that is still starting is waited for.

        url: postgresql:// or postgresql+asyncpg://.
        Raises DatabaseUnavailable after timeout_s, InvalidSettings if the URL is no good or the login is refused.
        """
        database = cls(url, pool_size=pool_size)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        waiting = False
        try:
            while True:
                try:
                    await database.ready()
                    return database
                except DatabaseUnavailable as error:
                    if asyncio.get_running_loop().time() >= deadline_s:
                        raise
                    if not waiting:
                        log.info("database_awaited", error=error.message)
                    waiting = True
                await asyncio.sleep(_RETRY_S)
        except BaseException:
            await database.close()
            raise

    def leadership(self) -> PgLeadership:
        return PgLeadership(self._url)

    async def ready(self) -> None:
        async with self._session.transaction() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        await self._session.close()

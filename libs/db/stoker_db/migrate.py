"""Bring a database to this version's tables, or say which it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection, func, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from stoker_core.errors import SetupFailed
from stoker_db.pg.session import connect_directly, translated

_COMMAND_S = 60.0

# Any number would do that nobody else locks in this database: "STOKMIGR" in ASCII.
_LOCK_KEY = 0x53544F4B4D494752


def _folder() -> Path:
    installed = Path(__file__).parent / "migrations"
    checkout = Path(__file__).parents[3] / "migrations"
    return installed if installed.is_dir() else checkout


async def upgrade(url: str) -> None:
    """Apply the migrations that are missing, all or none. Several callers at once wait for one another.

    One process migrates one database at a time: alembic's context is global.

    Raises DatabaseUnavailable, InvalidSettings, and SetupFailed if the database is of a version this one does not know.
    """
    await _run(url, lambda config: command.upgrade(config, "head"))


async def downgrade(url: str, revision: str = "base") -> None:
    """Undo migrations down to `revision`; what their tables hold is lost. Raises as `upgrade`."""
    await _run(url, lambda config: command.downgrade(config, revision))


async def current(url: str) -> str | None:
    """The revision that the database has; None before the first. Raises DatabaseUnavailable, InvalidSettings."""
    found: list[str | None] = []

    def read(connection: Connection) -> None:
        found.append(MigrationContext.configure(connection).get_current_revision())

    await with_connection(url, read)
    return found[0]


def lock(connection: Connection) -> None:
    """Wait until no other migration of this database runs; held until the end of the transaction."""
    connection.execute(select(func.pg_advisory_xact_lock(_LOCK_KEY)))


async def _run(url: str, action: Callable[[Config], None]) -> None:
    def migrate(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
        config.attributes["connection"] = connection
        lock(connection)
        action(config)

    try:
        await with_connection(url, migrate)
    except CommandError as error:
        raise SetupFailed(f"the database cannot be migrated: {error}") from error


async def with_connection(url: str, action: Callable[[Connection], None]) -> None:
    """Run `action` in one transaction on a connection of its own. Raises DatabaseUnavailable, InvalidSettings."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: connect_directly(url, command_timeout_s=_COMMAND_S, application_name="stoker migrate"),
    )
    try:
        with translated():
            async with engine.begin() as connection:
                await connection.run_sync(action)
    finally:
        await engine.dispose()

"""Alembic's entry: on the connection that `stoker_db.migrate` brings, or on STOKER_POSTGRES_URL for the alembic command."""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection

from stoker_db.migrate import lock, with_connection
from stoker_db.tables import metadata


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("migrations run on a database only; offline SQL is not supported")


def lock_and_migrate(connection: Connection) -> None:
    lock(connection)
    migrate(connection)


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    asyncio.run(with_connection(os.environ["STOKER_POSTGRES_URL"], lock_and_migrate))

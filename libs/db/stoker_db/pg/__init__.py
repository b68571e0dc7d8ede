"""The repositories on PostgreSQL. SQL is here and nowhere else."""

from stoker_db.pg.database import PgDatabase

__all__ = ["PgDatabase"]

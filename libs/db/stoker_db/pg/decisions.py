"""What was decided, and what then happened."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from stoker_contracts.codec import spelled_out
from stoker_contracts.decisions import DecisionRecord, Outcome
from stoker_db.pg.session import Session
from stoker_db.tables import DECISION_IS_CONCLUDED, decisions

_COLUMNS = [decisions.c[name] for name in DecisionRecord.__struct_fields__]
_NEWEST = (decisions.c.made_at.desc(), decisions.c.decision_id.desc())


class PgDecisions:
    """Implements stoker_db.ports.Decisions."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def add(self, record: DecisionRecord) -> None:
        new = insert(decisions).values(
            decision_id=record.decision_id,
            term=record.term,
            model_id=record.model_id,
            instance_id=record.instance_id,
            chosen=record.chosen,
            weighed=record.weighed,
            reason=record.reason,
            options=spelled_out(record.options),
        )
        async with self._session.transaction() as connection:
            await connection.execute(new.on_conflict_do_nothing(index_elements=[decisions.c.decision_id]))

    async def conclude(self, instance_id: str, outcome: Outcome) -> bool:
        # The first condition is the index's own, so that Postgres finds the row by it.
        started = (decisions.c.instance_id != "", decisions.c.instance_id == instance_id)
        change = update(decisions).where(*started, decisions.c.outcome.is_(None)).values(outcome=spelled_out(outcome))
        async with self._session.transaction() as connection:
            return (await connection.execute(change)).rowcount > 0

    async def of_model(self, model_id: str, limit: int = 20) -> list[DecisionRecord]:
        return await self._records(
            select(*_COLUMNS).where(decisions.c.model_id == model_id).order_by(*_NEWEST).limit(limit)
        )

    async def of_instance(self, instance_id: str) -> DecisionRecord | None:
        started = (decisions.c.instance_id != "", decisions.c.instance_id == instance_id)
        return next(iter(await self._records(select(*_COLUMNS).where(*started).limit(1))), None)

    async def concluded(self, limit: int = 100) -> list[DecisionRecord]:
        return await self._records(select(*_COLUMNS).where(DECISION_IS_CONCLUDED).order_by(*_NEWEST).limit(limit))

    async def prune(self, *, keep_s: float) -> int:
        before = func.now() - timedelta(seconds=keep_s)
        async with self._session.transaction() as connection:
            return (await connection.execute(delete(decisions).where(decisions.c.made_at <= before))).rowcount

    async def _records(self, query: Select[*tuple[Any, ...]]) -> list[DecisionRecord]:
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [msgspec.convert(row, DecisionRecord, from_attributes=True) for row in rows]

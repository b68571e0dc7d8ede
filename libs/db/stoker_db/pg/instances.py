"""Instances: desired state fenced by the leader's term, actual state as reported."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import Select, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from stoker_contracts.models import InstanceState, StartPhases
from stoker_core.errors import StaleTerm
from stoker_db.pg.session import Session
from stoker_db.ports import InstanceRow
from stoker_db.tables import INSTANCE_IS_LIVE, instances, leader

_COLUMNS = [instances.c[name] for name in InstanceRow.__struct_fields__]


class PgInstances:
    """Implements stoker_db.ports.Instances."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def desire(self, row: InstanceRow) -> None:
        new = insert(instances).values(
            instance_id=row.instance_id,
            model_id=row.model_id,
            node=row.node,
            boot_id=row.boot_id,
            devices=list(row.devices),
            desired=row.desired,
            actual=row.actual,
            term=row.term,
            reason=row.reason,
            phases=msgspec.structs.asdict(row.phases),
        )
        write = new.on_conflict_do_update(
            index_elements=[instances.c.instance_id],
            set_={
                "desired": new.excluded.desired,
                "term": new.excluded.term,
                "reason": new.excluded.reason,
                "updated_at": func.now(),
            },
            where=instances.c.term <= new.excluded.term,
        ).returning(instances.c.term)
        # The share lock makes the next leader's increment wait for this write, so none slips in after it.
        fence = select(leader.c.term).with_for_update(read=True)
        async with self._session.transaction() as connection:
            highest = (await connection.execute(fence)).scalar_one()
            if highest > row.term:
                raise StaleTerm(row.term, highest)
            if (await connection.execute(write)).first() is None:
                own = select(instances.c.term).where(instances.c.instance_id == row.instance_id)
                raise StaleTerm(row.term, (await connection.execute(own)).scalar_one())

    async def record(
        self, instance_id: str, actual: InstanceState, *, reason: str = "", phases: StartPhases | None = None
    ) -> None:
        """An empty reason and phases None leave what is stored."""
        values: dict[str, Any] = {"actual": actual, "updated_at": func.now()}
        if reason:
            values["reason"] = reason
        if phases is not None:
            values["phases"] = msgspec.structs.asdict(phases)
        async with self._session.transaction() as connection:
            await connection.execute(update(instances).where(instances.c.instance_id == instance_id).values(values))

    async def live(self) -> list[InstanceRow]:
        return await self._rows(select(*_COLUMNS).where(INSTANCE_IS_LIVE).order_by(instances.c.instance_id))

    async def recent(self, limit: int = 100) -> list[InstanceRow]:
        newest = (instances.c.created_at.desc(), instances.c.instance_id.desc())
        return await self._rows(select(*_COLUMNS).order_by(*newest).limit(limit))

    async def prune(self, *, keep_s: float) -> int:
        before = func.now() - timedelta(seconds=keep_s)
        ended = delete(instances).where(instances.c.created_at <= before, text(f"NOT ({INSTANCE_IS_LIVE.text})"))
        async with self._session.transaction() as connection:
            return (await connection.execute(ended)).rowcount

    async def _rows(self, query: Select[*tuple[Any, ...]]) -> list[InstanceRow]:
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [msgspec.convert(row, InstanceRow, from_attributes=True) for row in rows]

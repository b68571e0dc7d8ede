"""Nodes and their devices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from sqlalchemy import Executable, RowMapping, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from stoker_contracts.models import Device, DeviceKind
from stoker_core.errors import NodeTaken, StaleTerm
from stoker_db.pg.session import Session
from stoker_db.ports import DrainRow, NodeRow
from stoker_db.tables import devices, drains, leader, nodes

# One statement for nodes and devices, so that a registration is seen wholly or not at all.
_QUERY = (
    select(
        nodes.c.name.label("node"),
        nodes.c.boot_id,
        devices.c.index.label("device_index"),
        devices.c.kind,
        devices.c.name.label("device_name"),
        devices.c.memory_bytes,
    )
    .select_from(nodes.outerjoin(devices))
    .order_by(nodes.c.name, devices.c.index)
)


def _nodes(rows: Iterable[RowMapping]) -> list[NodeRow]:
    return [
        NodeRow(name=name, boot_id=boot_id, devices=tuple(_device(row) for row in group if row["kind"] is not None))
        for (name, boot_id), group in groupby(rows, key=lambda row: (row["node"], row["boot_id"]))
    ]


def _device(row: RowMapping) -> Device:
    return Device(
        index=row["device_index"],
        kind=DeviceKind(row["kind"]),
        name=row["device_name"],
        memory_bytes=row["memory_bytes"],
    )


class PgNodes:
    """Implements stoker_db.ports.Nodes."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def register(self, node: NodeRow, *, replaces: str | None) -> None:
        swap: Executable
        if replaces is None:
            new = insert(nodes).values(name=node.name, boot_id=node.boot_id)
            swap = new.on_conflict_do_nothing().returning(nodes.c.name)
        else:
            old = update(nodes).where(nodes.c.name == node.name, nodes.c.boot_id == replaces)
            swap = old.values(boot_id=node.boot_id, registered_at=func.now()).returning(nodes.c.name)
        async with self._session.transaction() as connection:
            if (await connection.execute(swap)).first() is None:
                holder = select(nodes.c.boot_id).where(nodes.c.name == node.name)
                raise NodeTaken(node.name, (await connection.execute(holder)).scalar_one_or_none() or "none")
            await connection.execute(delete(devices).where(devices.c.node == node.name))
            if node.devices:
                rows = [
                    {
                        "node": node.name,
                        "index": d.index,
                        "kind": d.kind,
                        "name": d.name,
                        "memory_bytes": d.memory_bytes,
                    }
                    for d in node.devices
                ]
                await connection.execute(insert(devices), rows)

    async def leave(self, name: str, boot_id: str) -> None:
        async with self._session.transaction() as connection:
            await connection.execute(delete(nodes).where(nodes.c.name == name, nodes.c.boot_id == boot_id))

    async def get(self, name: str) -> NodeRow | None:
        async with self._session.transaction() as connection:
            rows = (await connection.execute(_QUERY.where(nodes.c.name == name))).mappings().all()
        return next(iter(_nodes(rows)), None)

    async def all(self) -> list[NodeRow]:
        async with self._session.transaction() as connection:
            return _nodes((await connection.execute(_QUERY)).mappings().all())

    async def drain(self, row: DrainRow) -> None:
        new = insert(drains).values(node=row.node, term=row.term, drained=row.drained)
        write = new.on_conflict_do_update(
            index_elements=[drains.c.node], set_={"term": new.excluded.term, "drained": new.excluded.drained}
        )
        async with self._session.transaction() as connection:
            await _fence(connection, row.term)
            await connection.execute(write)

    async def undrain(self, name: str, *, term: int) -> bool:
        async with self._session.transaction() as connection:
            await _fence(connection, term)
            return (await connection.execute(delete(drains).where(drains.c.node == name))).rowcount > 0

    async def drains(self) -> list[DrainRow]:
        query = select(drains.c.node, drains.c.term, drains.c.drained).order_by(drains.c.node)
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [DrainRow(node=row.node, term=row.term, drained=row.drained) for row in rows]


async def _fence(connection: AsyncConnection, term: int) -> None:
    """Raises StaleTerm below the leader's term. The next leader's increment waits for this transaction: the lock is shared."""
    highest = (await connection.execute(select(leader.c.term).with_for_update(read=True))).scalar_one()
    if highest > term:
        raise StaleTerm(term, highest)

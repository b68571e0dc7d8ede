"""What tiers hold, how they did over time, and what loads took."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import msgspec
from sqlalchemy import delete, func, literal, select
from sqlalchemy.dialects.postgresql import distinct_on, insert

from stoker_contracts.control import LinkStatus, TierStatus
from stoker_contracts.models import Tier
from stoker_db.pg.session import Session
from stoker_db.ports import LoadObservation, Placement
from stoker_db.tables import link_metrics, load_observations, models, placements, tier_metrics

_SAMPLE = [tier_metrics.c[name] for name in TierStatus.__struct_fields__]
_LINK = [link_metrics.c[name] for name in LinkStatus.__struct_fields__]
_OBSERVATION = [load_observations.c[name] for name in LoadObservation.__struct_fields__]


class PgTiers:
    """Implements stoker_db.ports.Tiers."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def place(self, placement: Placement) -> None:
        """A placement of a model that has been deleted meanwhile is left out."""
        table = placements.c
        if placement.held_bytes == 0:
            gone = delete(placements).where(
                table.model_id == placement.model_id, table.node == placement.node, table.tier == placement.tier
            )
            async with self._session.transaction() as connection:
                await connection.execute(gone)
            return
        # The lock on the model's row lets a deletion come before or after, not in between.
        row = (
            select(
                models.c.model_id, literal(placement.node), literal(str(placement.tier)), literal(placement.held_bytes)
            )
            .where(models.c.model_id == placement.model_id)
            .with_for_update(read=True, key_share=True)
        )
        new = insert(placements).from_select([table.model_id, table.node, table.tier, table.held_bytes], row)
        write = new.on_conflict_do_update(
            constraint="pk_placements", set_={"held_bytes": new.excluded.held_bytes, "updated_at": func.now()}
        )
        async with self._session.transaction() as connection:
            await connection.execute(write)

    async def placements(self, model_id: str | None = None) -> list[Placement]:
        """Ordered by model, node, tier."""
        table = placements.c
        query = select(table.model_id, table.node, table.tier, table.held_bytes)
        if model_id is not None:
            query = query.where(table.model_id == model_id)
        query = query.order_by(table.model_id, table.node, table.tier)
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [Placement(model_id=r.model_id, node=r.node, tier=Tier(r.tier), held_bytes=r.held_bytes) for r in rows]

    async def sample(self, node: str, tiers: Sequence[TierStatus], links: Sequence[LinkStatus] = ()) -> None:
        of_tiers = [{"node": node, **msgspec.structs.asdict(tier)} for tier in tiers]
        of_links = [{"node": node, **msgspec.structs.asdict(link)} for link in links]
        written = [(table, rows) for table, rows in ((tier_metrics, of_tiers), (link_metrics, of_links)) if rows]
        if not written:
            return
        async with self._session.transaction() as connection:
            for table, rows in written:
                await connection.execute(insert(table), rows)

    async def latest(self) -> list[tuple[str, TierStatus]]:
        """Ordered by node, tier."""
        table = tier_metrics.c
        query = (
            select(table.node, *_SAMPLE)
            .ext(distinct_on(table.node, table.tier))
            .order_by(table.node, table.tier, table.id.desc())
        )
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [(row.node, msgspec.convert(row, TierStatus, from_attributes=True)) for row in rows]

    async def links(self) -> list[tuple[str, LinkStatus]]:
        """Ordered by node, peer."""
        table = link_metrics.c
        query = (
            select(table.node, *_LINK)
            .ext(distinct_on(table.node, table.peer))
            .order_by(table.node, table.peer, table.id.desc())
        )
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [(row.node, msgspec.convert(row, LinkStatus, from_attributes=True)) for row in rows]

    async def observe(self, observation: LoadObservation) -> None:
        async with self._session.transaction() as connection:
            await connection.execute(insert(load_observations).values(msgspec.structs.asdict(observation)))

    async def observations(self, limit: int = 100) -> list[LoadObservation]:
        query = select(*_OBSERVATION).order_by(load_observations.c.id.desc()).limit(limit)
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [msgspec.convert(row, LoadObservation, from_attributes=True) for row in rows]

    async def prune(self, *, keep_s: float) -> int:
        before = func.now() - timedelta(seconds=keep_s)
        async with self._session.transaction() as connection:
            samples = await connection.execute(delete(tier_metrics).where(tier_metrics.c.sampled_at <= before))
            links = await connection.execute(delete(link_metrics).where(link_metrics.c.sampled_at <= before))
            loads = await connection.execute(delete(load_observations).where(load_observations.c.observed_at <= before))
        return samples.rowcount + links.rowcount + loads.rowcount

"""Composition root: the one place where the scheduler's concrete parts are chosen."""

from __future__ import annotations

import asyncio

from stoker_bus.events import EventPublisher
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import LeadershipLost, StaleTerm
from stoker_core.ids import Ids, RandomIds
from stoker_core.runner import run_parts
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database
from stoker_scheduler.loops import Leader
from stoker_scheduler.settings import SchedulerSettings
from stoker_scheduler.standby import stand_by


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Connect, then stand by or lead until `stop` is set. Raises LeadershipLost when the lead is gone."""
    database = await PgDatabase.connect(settings.postgres_url, pool_size=settings.commands_at_once)
    try:
        bus = await NatsBus.connect(settings.nats_url, name="scheduler")
        try:
            await schedule(settings, stop, bus=bus, database=database, clock=SystemClock(), ids=RandomIds())
        finally:
            await bus.close()
    finally:
        await database.close()


async def schedule(
    settings: SchedulerSettings, stop: asyncio.Event, *, bus: Bus, database: Database, clock: Clock, ids: Ids
) -> None:
    """Stand by, then lead until `stop` is set.

    A lead is never taken twice by one process: whoever loses it ends, and comes back as a candidate that knows nothing.
    Raises a group with LeadershipLost, or whatever else ended a part.
    """
    leader_id = ids.new("scheduler")
    leadership = database.leadership()
    try:
        term = await stand_by(leadership, leader_id, stop, interval_s=settings.standby_interval_s)
        if term is None:
            return
        events = EventPublisher(bus, service="scheduler", name=settings.node, boot_id=leader_id, clock=clock, ids=ids)
        leader = Leader(
            settings,
            term=term,
            leader_id=leader_id,
            bus=bus,
            database=database,
            leadership=leadership,
            events=events,
            clock=clock,
            ids=ids,
        )
        try:
            await leader.begin()
            await run_parts([*leader.parts(), events.part()], stop, drain_s=settings.drain_s)
        finally:
            await leader.end()
    except* StaleTerm as stale:
        raise LeadershipLost(f"term {term} is superseded") from stale
    finally:
        await leadership.release()

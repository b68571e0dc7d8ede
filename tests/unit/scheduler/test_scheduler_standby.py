"""Taking the lead, and not taking it."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.scheduler.rig import settle

from stoker_bus.memory import MemoryBroker
from stoker_core.clock import SystemClock
from stoker_core.errors import LeadershipLost
from stoker_core.ids import SequentialIds
from stoker_db.memory import MemoryDatabase
from stoker_scheduler.app import schedule
from stoker_scheduler.settings import SchedulerSettings
from stoker_scheduler.standby import stand_by

SOON_S = 0.001


async def test_a_candidate_takes_the_lead_once_the_leader_lets_go() -> None:
    database = MemoryDatabase()
    first = database.leadership()
    assert await first.acquire("s1") == 1
    waiting = asyncio.create_task(stand_by(database.leadership(), "s2", asyncio.Event(), interval_s=SOON_S))
    await settle()
    assert not waiting.done()
    await first.release()
    assert await waiting == 2


async def test_a_candidate_waits_for_a_database_that_is_away() -> None:
    database = MemoryDatabase()
    database.go_down()
    waiting = asyncio.create_task(stand_by(database.leadership(), "s1", asyncio.Event(), interval_s=SOON_S))
    await settle()
    assert not waiting.done()
    database.come_up()
    assert await waiting == 1


async def test_a_candidate_that_is_told_to_stop_does_not_lead() -> None:
    database = MemoryDatabase()
    await database.leadership().acquire("s1")
    stop = asyncio.Event()
    waiting = asyncio.create_task(stand_by(database.leadership(), "s2", stop, interval_s=60.0))
    await settle()
    stop.set()
    assert await waiting is None


async def test_losing_the_lock_ends_the_service_and_stopping_gives_the_lead_up() -> None:
    database, broker = MemoryDatabase(), MemoryBroker()
    settings = SchedulerSettings(node="s1", check_interval_s=SOON_S)

    async def run(stop: asyncio.Event) -> None:
        bus = broker.connect()
        await schedule(settings, stop, bus=bus, database=database, clock=SystemClock(), ids=SequentialIds())

    loses = asyncio.create_task(run(asyncio.Event()))
    await settle()
    database.go_down()
    with pytest.raises(ExceptionGroup) as lost:
        await loses
    assert lost.group_contains(LeadershipLost, depth=None)
    database.come_up()

    stop = asyncio.Event()
    stops = asyncio.create_task(run(stop))
    await settle()
    assert await database.leadership().acquire("other") is None
    stop.set()
    await stops
    assert await database.leadership().acquire("other") == 3

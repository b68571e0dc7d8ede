"""Schedulers with real NATS and PostgreSQL, and workers that only speak."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest
from tests.support.fake_worker import FakeWorker, cpu_slots, model_spec
from tests.support.nats_server import NatsServer

from stoker_bus.nats import NatsBus
from stoker_bus.port import ask, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import CommandReply, Demand, Done, WantDrain
from stoker_contracts.events import CloudEvent
from stoker_contracts.models import InstanceState
from stoker_core.clock import SystemClock
from stoker_core.errors import LeadershipLost
from stoker_core.ids import RandomIds
from stoker_db.pg import PgDatabase
from stoker_db.ports import InstanceRow
from stoker_scheduler.app import schedule, serve
from stoker_scheduler.settings import SchedulerSettings

READY, STOPPED = InstanceState.READY, InstanceState.STOPPED


@pytest.fixture
def settings(nats_url: str, postgres_url: str) -> SchedulerSettings:
    return SchedulerSettings(node="s1", nats_url=nats_url, postgres_url=postgres_url, standby_interval_s=0.1)


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[PgDatabase]:
    database = await PgDatabase.connect(postgres_url)
    yield database
    await database.close()


@pytest.fixture
async def bus(settings: SchedulerSettings) -> AsyncIterator[NatsBus]:
    bus = await NatsBus.connect(settings.nats_url, name="test")
    yield bus
    await bus.close()


@asynccontextmanager
async def scheduler(settings: SchedulerSettings, *, fails: bool = False) -> AsyncIterator[asyncio.Task[None]]:
    """A scheduler in this process, stopped in an orderly way at the end. fails: the test has it fail before."""
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait([task])
    if not fails:
        task.result()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


async def answered(worker: FakeWorker, term: int = 1) -> None:
    async def told() -> bool:
        return worker.term >= term

    await until(told)


async def want(bus: NatsBus, model_id: str, queued: int = 1) -> None:
    demand = Demand(gateway_id="g1", model_id=model_id, queued=queued, oldest_wait_ms=0)
    await send(bus, subjects.SCHEDULER_DEMAND, demand)


async def rows_are(database: PgDatabase, *expected: tuple[InstanceState, InstanceState]) -> list[InstanceRow]:
    """Wait until the instances' (desired, actual), newest first, are these."""
    rows: list[InstanceRow] = []

    async def they_are() -> bool:
        rows[:] = await database.instances.recent()
        return [(r.desired, r.actual) for r in rows] == list(expected)

    try:
        await until(they_are)
    except TimeoutError:
        pytest.fail(f"the rows stay {rows}")
    return rows


async def test_a_cold_demand_starts_exactly_one_instance(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    await database.models.add(model_spec("a"), [])
    async with FakeWorker(bus, "n1", devices=cpu_slots(2), start_s=0.3) as worker, scheduler(settings):
        await answered(worker)
        for _ in range(10):
            await want(bus, "a")
            await asyncio.sleep(0.02)
        [row] = await rows_are(database, (READY, READY))
        assert len(worker.starts) == 1
        assert (row.term, row.node, row.devices) == (1, "n1", (0,))
        assert row.phases.start_ms > 0

        async def placed() -> list[CloudEvent]:
            stored = bus.follow(subjects.event("instance", "placed"), since_sequence=1, follow=False)
            return [decode(CloudEvent, m.data) async for m in stored]

        async def is_told() -> bool:
            return len(await placed()) == 1

        await until(is_told)
        [event] = await placed()
        assert event.subject == row.instance_id
        assert event.data["model"] == "a"
        assert event.data["place_ms"] >= 0


async def test_an_idle_instance_stops_after_its_keep_alive_and_starts_again(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    await database.models.add(model_spec("a", keep_alive_s=0.2), [])
    async with FakeWorker(bus, "n1") as worker, scheduler(settings):
        await answered(worker)
        await want(bus, "a")
        await rows_are(database, (READY, READY))
        await want(bus, "a", queued=0)
        await rows_are(database, (STOPPED, STOPPED))
        assert [s.only_if_idle for s in worker.stops] == [True]
        await want(bus, "a")
        await rows_are(database, (READY, READY), (STOPPED, STOPPED))


async def test_when_the_leaders_connection_is_cut_it_ends_and_a_standby_adopts_what_runs(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    await database.models.add(model_spec("a"), [])
    async with FakeWorker(bus, "n1", devices=cpu_slots(2)) as worker, scheduler(settings, fails=True) as leader:
        await answered(worker, 1)
        async with scheduler(settings):
            await want(bus, "a")
            [first] = await rows_are(database, (READY, READY))
            await _cut_the_lock(settings.postgres_url)
            await asyncio.wait([leader])
            error = leader.exception()
            assert isinstance(error, ExceptionGroup)
            assert error.subgroup(LeadershipLost)
            await answered(worker, 2)
            for _ in range(5):
                await want(bus, "a")
                await asyncio.sleep(0.05)
            await database.models.add(model_spec("b"), [])
            await want(bus, "b")
            second, kept = await rows_are(database, (READY, READY), (READY, READY))
            assert kept.instance_id == first.instance_id
            assert (second.model_id, second.term) == ("b", 2)
            assert len(worker.starts) == 2


async def test_a_killed_leader_is_followed_by_another_process_with_a_higher_term(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    await database.models.add(model_spec("a"), [])
    env = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")} | {
        "STOKER_NATS_URL": settings.nats_url,
        "STOKER_POSTGRES_URL": settings.postgres_url,
        "STOKER_NODE": "s1",
    }

    async def process() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(sys.executable, "-m", "stoker_scheduler", env=env)

    async with FakeWorker(bus, "n1") as worker:
        leader = await process()
        try:
            await answered(worker, 1)
            await want(bus, "a")
            await rows_are(database, (READY, READY))
        finally:
            leader.kill()
            await leader.wait()
        heir = await process()
        try:
            await answered(worker, 2)
            await want(bus, "a")
            await rows_are(database, (READY, READY))
            assert len(worker.starts) == 1
        finally:
            heir.send_signal(signal.SIGTERM)
            assert await heir.wait() == 0


async def test_a_restart_of_nats_loses_no_instance_and_new_demand_goes_through(
    nats_server: NatsServer, postgres_url: str, database: PgDatabase
) -> None:
    settings = SchedulerSettings(node="s1", nats_url=nats_server.url, postgres_url=postgres_url)
    await database.models.add(model_spec("a"), [])
    await database.models.add(model_spec("b"), [])
    bus = await NatsBus.connect(nats_server.url, name="test")
    async with FakeWorker(bus, "n1", devices=cpu_slots(2)) as worker, scheduler(settings) as leader:
        await answered(worker)
        await want(bus, "a")
        await rows_are(database, (READY, READY))
        nats_server.kill()
        await asyncio.sleep(0.2)
        nats_server.start()

        async def back() -> bool:
            return bus.connected

        await until(back)

        async def started() -> bool:
            if bus.connected:
                await want(bus, "b")
            return len(worker.starts) == 2

        await until(started)
        await rows_are(database, (READY, READY), (READY, READY))
        assert not leader.done()
    await bus.close()


async def test_a_second_scheduler_stands_by_while_the_first_leads(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    ids, clock = RandomIds(), SystemClock()
    async with FakeWorker(bus, "n1") as worker, scheduler(settings):
        await answered(worker)
        stop = asyncio.Event()
        standby = asyncio.create_task(schedule(settings, stop, bus=bus, database=database, clock=clock, ids=ids))
        await asyncio.sleep(0.5)
        assert worker.term == 1
        assert not standby.done()
        stop.set()
        await standby


async def _cut_the_lock(postgres_url: str) -> None:
    """End the session that holds the advisory lock, as a failing network or an administrator would."""
    connection = await asyncpg.connect(postgres_url)
    try:
        cut = await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        assert len(cut) == 1
    finally:
        await connection.close()


async def test_a_drain_outlives_its_leader_and_every_start_is_told_beside_what_was_predicted(
    settings: SchedulerSettings, database: PgDatabase, bus: NatsBus
) -> None:
    await database.models.add(model_spec("a", weight_bytes=1 << 20), [])

    async def drain(node: str, *, undo: bool = False) -> None:
        reply: CommandReply = await ask(
            bus, subjects.SCHEDULER_DRAIN, WantDrain(node=node, undo=undo), CommandReply, timeout_s=5
        )
        assert isinstance(reply, Done)

    async def drained() -> bool:
        return [row.drained for row in await database.nodes.drains()] == [True]

    async def concluded() -> bool:
        return len(await database.decisions.concluded()) == 2

    async with FakeWorker(bus, "n1") as first, FakeWorker(bus, "n2") as second:
        async with scheduler(settings):
            await answered(first)
            await answered(second)
            await want(bus, "a")
            [row] = await rows_are(database, (READY, READY))
            await want(bus, "a", queued=0)
            await drain(row.node)
            await until(drained)
            await rows_are(database, (STOPPED, STOPPED))
        async with scheduler(settings):
            await answered(first, 2)
            await answered(second, 2)
            await want(bus, "a")
            other, _ = await rows_are(database, (READY, READY), (STOPPED, STOPPED))
            assert {row.node, other.node} == {"n1", "n2"}
            await until(concluded)
            await drain(row.node, undo=True)
            assert await database.nodes.drains() == []
    newest, oldest = await database.decisions.of_model("a")
    assert [(r.term, r.instance_id) for r in (newest, oldest)] == [(2, other.instance_id), (1, row.instance_id)]
    for record in (newest, oldest):
        assert record.option is not None
        assert record.outcome is not None
        assert (record.outcome.failure, record.outcome.engine_s) == ("", 0.08)
        assert record.error is not None

import asyncio

import asyncpg
import pytest
from tests.support.databases import DatabaseKind, an_instance, execute

from stoker_contracts.models import InstanceState, StartPhases
from stoker_core.errors import StaleTerm
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, InstanceRow
from stoker_db.tables import INSTANCE_IS_LIVE

READY, STOPPED, FAILED = InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED
PHASES = StartPhases(fork_ms=1.5, lease_ms=2, load_ms=3, engine_ms=4, announce_ms=0.25)


async def only(database: Database, instance_id: str = "instance-1") -> InstanceRow:
    return next(row for row in await database.instances.recent() if row.instance_id == instance_id)


async def test_an_instance_is_returned_as_it_was_desired(database: Database) -> None:
    await database.instances.desire(an_instance(term=3, reason="demand"))
    row = await only(database)
    assert row.created_at is not None
    assert (row.instance_id, row.model_id, row.node, row.boot_id) == ("instance-1", "model-tiny", "node-a", "boot-1")
    assert (row.devices, row.desired, row.actual) == ((0, 1), READY, InstanceState.STARTING)
    assert (row.term, row.reason, row.phases) == (3, "demand", StartPhases())


async def test_desiring_again_changes_desired_term_and_reason_only(database: Database) -> None:
    await database.instances.desire(an_instance(term=1, reason="demand"))
    await database.instances.record("instance-1", READY, phases=PHASES)
    before = await only(database)
    await database.instances.desire(an_instance(term=2, desired=STOPPED, actual=FAILED, reason="idle"))
    row = await only(database)
    assert (row.desired, row.term, row.reason) == (STOPPED, 2, "idle")
    assert (row.actual, row.phases, row.created_at) == (READY, PHASES, before.created_at)


async def test_a_term_below_the_leaders_is_stale_and_nothing_is_written(database: Database) -> None:
    leader, successor = database.leadership(), database.leadership()
    assert await leader.acquire("first") == 1
    await database.instances.desire(an_instance(term=1))
    await leader.release()
    assert await successor.acquire("second") == 2
    for instance_id in ("instance-1", "instance-2"):
        with pytest.raises(StaleTerm) as caught:
            await database.instances.desire(an_instance(instance_id, term=1, desired=STOPPED))
        assert (caught.value.term, caught.value.highest) == (1, 2)
    assert [(r.instance_id, r.desired, r.term) for r in await database.instances.recent()] == [("instance-1", READY, 1)]
    await database.instances.desire(an_instance(term=2, desired=STOPPED))
    assert (await only(database)).desired == STOPPED
    await successor.release()


async def test_a_term_below_the_rows_own_is_stale(database: Database) -> None:
    await database.instances.desire(an_instance(term=5))
    with pytest.raises(StaleTerm) as caught:
        await database.instances.desire(an_instance(term=4, desired=STOPPED))
    assert (caught.value.term, caught.value.highest) == (4, 5)
    assert (await only(database)).desired == READY


async def test_a_stale_write_that_meets_the_next_leader_midway_waits_and_is_refused(postgres_url: str) -> None:
    database = await PgDatabase.connect(postgres_url)
    successor = await asyncpg.connect(postgres_url)
    async with successor.transaction():
        await successor.execute("UPDATE leader SET term = 2")
        writing = asyncio.create_task(database.instances.desire(an_instance(term=1)))
        while not await execute(postgres_url, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert not writing.done()
            await asyncio.sleep(0.01)
    with pytest.raises(StaleTerm):
        await writing
    assert await database.instances.recent() == []
    await successor.close()
    await database.close()


async def test_actual_state_is_recorded_with_reason_and_phases(database: Database) -> None:
    await database.instances.desire(an_instance(reason="demand"))
    await database.instances.record("instance-1", READY, phases=PHASES)
    row = await only(database)
    assert (row.actual, row.reason, row.phases, row.desired) == (READY, "demand", PHASES, READY)
    await database.instances.record("instance-1", FAILED, reason="out of memory")
    row = await only(database)
    assert (row.actual, row.reason, row.phases) == (FAILED, "out of memory", PHASES)


async def test_a_state_of_a_newer_worker_is_recorded_as_unknown(database: Database) -> None:
    await database.instances.desire(an_instance())
    await database.instances.record("instance-1", InstanceState("hibernating"))
    assert (await only(database)).actual == InstanceState.UNKNOWN


async def test_recording_an_unknown_instance_changes_nothing(database: Database) -> None:
    await database.instances.record("instance-9", READY, reason="x", phases=PHASES)
    assert await database.instances.recent() == []


async def test_live_are_those_that_run_and_those_that_should_and_have_not_failed(database: Database) -> None:
    expected = []
    for desired in (READY, STOPPED):
        for actual in InstanceState:
            instance_id = f"i-{desired}-{actual}"
            await database.instances.desire(an_instance(instance_id, desired=desired))
            await database.instances.record(instance_id, actual)
            runs = actual in (InstanceState.STARTING, READY, InstanceState.STOPPING)
            if runs or (desired == READY and actual != FAILED):
                expected.append(instance_id)
    live = [row.instance_id for row in await database.instances.live()]
    assert live == sorted(expected)
    assert 0 < len(live) < len(await database.instances.recent())


async def test_recent_instances_come_newest_first_and_no_more_than_asked_for(database: Database) -> None:
    for number in range(5):
        await database.instances.desire(an_instance(f"instance-{number}"))
    await database.instances.desire(an_instance("instance-0", desired=STOPPED))
    newest = [f"instance-{number}" for number in (4, 3, 2, 1, 0)]
    assert [row.instance_id for row in await database.instances.recent()] == newest
    assert [row.instance_id for row in await database.instances.recent(2)] == newest[:2]


async def test_all_clients_see_the_same_instances(database_kind: DatabaseKind) -> None:
    await database_kind.database.instances.desire(an_instance())
    assert await database_kind.other.instances.live() == await database_kind.database.instances.live() != []


async def test_the_live_instances_are_found_by_their_index(postgres_url: str) -> None:
    """The condition of the query and of the index are the same to Postgres, however many instances are history."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("SET enable_seqscan = off")
    plan = await connection.fetch(f"EXPLAIN SELECT * FROM instances WHERE {INSTANCE_IS_LIVE.text} ORDER BY instance_id")
    await connection.close()
    assert any("ix_instances_live" in line[0] for line in plan), plan


async def test_pruning_forgets_what_ended_long_ago_and_nothing_that_lives(database_kind: DatabaseKind) -> None:
    instances = database_kind.database.instances
    for instance_id in ("lives", "stopped", "failed"):
        await instances.desire(an_instance(instance_id=instance_id))
    await instances.desire(an_instance(instance_id="stopped", desired=STOPPED))
    await instances.record("lives", READY)
    await instances.record("stopped", STOPPED)
    await instances.record("failed", FAILED)
    await database_kind.age(3600)
    await instances.desire(an_instance(instance_id="new"))
    await instances.record("new", FAILED)
    assert await instances.prune(keep_s=7200) == 0
    assert await instances.prune(keep_s=1800) == 2
    assert {row.instance_id for row in await instances.recent()} == {"lives", "new"}

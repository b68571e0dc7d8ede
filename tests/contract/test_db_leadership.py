import asyncio
import sys

import pytest
from tests.support.databases import DatabaseKind, execute

from stoker_core.errors import DatabaseUnavailable, LeadershipLost
from stoker_db.pg import PgDatabase
from stoker_db.pg.leadership import IDLE_LIMIT_MS
from stoker_db.ports import Database


async def test_one_leads_and_others_stand_by(database_kind: DatabaseKind) -> None:
    leader, standby = database_kind.database.leadership(), database_kind.other.leadership()
    assert await leader.acquire("first") == 1
    assert await standby.acquire("second") is None
    assert await standby.acquire("second") is None
    await leader.check()
    await leader.release()


async def test_of_simultaneous_candidates_one_leads(database_kind: DatabaseKind) -> None:
    candidates = [database.leadership() for database in [database_kind.database, database_kind.other] * 3]
    terms = await asyncio.gather(*(c.acquire(f"candidate-{n}") for n, c in enumerate(candidates)))
    assert [term for term in terms if term is not None] == [1]
    for candidate in candidates:
        await candidate.release()


async def test_each_leader_has_a_higher_term_than_the_one_before(database: Database) -> None:
    first, second = database.leadership(), database.leadership()
    assert await first.acquire("first") == 1
    await first.release()
    assert await second.acquire("second") == 2
    await second.release()
    assert await first.acquire("first") == 3
    await first.release()


async def test_who_does_not_lead_has_no_leadership_to_check(database: Database) -> None:
    leadership, leader = database.leadership(), database.leadership()
    with pytest.raises(LeadershipLost):
        await leadership.check()
    assert await leader.acquire("first") == 1
    assert await leadership.acquire("second") is None
    with pytest.raises(LeadershipLost):
        await leadership.check()
    await leader.release()
    with pytest.raises(LeadershipLost):
        await leader.check()


async def test_releasing_is_idempotent_and_takes_nothing_from_another(database: Database) -> None:
    leader, other = database.leadership(), database.leadership()
    assert await leader.acquire("first") == 1
    await other.release()
    await other.release()
    await leader.check()
    assert await other.acquire("second") is None
    await leader.release()
    await leader.release()


async def test_taking_the_lead_twice_is_a_mistake(database: Database) -> None:
    leader = database.leadership()
    assert await leader.acquire("first") == 1
    with pytest.raises(RuntimeError):
        await leader.acquire("first")
    await leader.check()
    await leader.release()


async def test_a_cut_connection_loses_the_lead_and_frees_it(database_kind: DatabaseKind) -> None:
    leader, successor = database_kind.database.leadership(), database_kind.other.leadership()
    assert await leader.acquire("first") == 1
    await database_kind.cut(leader)
    assert await successor.acquire("second") == 2
    with pytest.raises(LeadershipLost):
        await leader.check()
    with pytest.raises(LeadershipLost):
        await leader.check()
    await leader.release()
    await successor.check()
    assert await leader.acquire("first") is None
    await successor.release()


async def test_a_leader_that_does_not_ping_is_replaced(postgres_url: str) -> None:
    database = await PgDatabase.connect(postgres_url)
    stuck, successor = database.leadership(), database.leadership()
    assert await stuck.acquire("stuck") == 1
    async with asyncio.timeout(IDLE_LIMIT_MS / 1000 * 10):
        while await successor.acquire("next") is None:
            await asyncio.sleep(0.1)
    with pytest.raises(LeadershipLost):
        await stuck.check()
    await successor.release()
    await database.close()


async def test_who_leads_and_since_when_can_be_read(postgres_url: str) -> None:
    database = await PgDatabase.connect(postgres_url)
    leader = database.leadership()
    await leader.acquire("scheduler-7")
    assert await execute(postgres_url, "SELECT term, holder, acquired_at <= now() FROM leader") == [
        (1, "scheduler-7", True)
    ]
    await leader.release()
    await database.close()


async def test_a_leader_stopped_in_the_middle_of_a_write_does_not_keep_the_next_from_its_term(
    postgres_url: str,
) -> None:
    """Its transaction holds a lock on the term. It is stopped, so only the server can end it."""
    script = """
import asyncio, os, signal, sys
from sqlalchemy import select
from stoker_db.pg import PgDatabase
from stoker_db.tables import leader
async def main():
    database = await PgDatabase.connect(sys.argv[1])
    async with database._session.transaction() as connection:
        await connection.execute(select(leader.c.term).with_for_update(read=True))
        os.kill(os.getpid(), signal.SIGSTOP)
asyncio.run(main())
"""
    stuck = await asyncio.create_subprocess_exec(sys.executable, "-c", script, postgres_url)
    database = await PgDatabase.connect(postgres_url)
    try:
        async with asyncio.timeout(60):
            while not await execute(postgres_url, "SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction'"):
                await asyncio.sleep(0.05)
            successor, term = database.leadership(), None
            refusals = 0
            while term is None:
                try:
                    term = await successor.acquire("next")
                except DatabaseUnavailable:
                    refusals += 1
        assert (term, refusals > 0) == (1, True)
        await successor.release()
    finally:
        stuck.kill()
        await stuck.wait()
        await database.close()

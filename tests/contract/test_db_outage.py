"""What every call does while the database is away, and after."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from tests.support.databases import a_decision, a_model, an_instance, execute
from tests.support.postgres_server import RestartableServer

from stoker_contracts.control import TierStatus
from stoker_contracts.decisions import Outcome
from stoker_contracts.models import InstanceState, Tier
from stoker_core.errors import DatabaseUnavailable, InvalidSettings, LeadershipLost
from stoker_db.memory import MemoryDatabase
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, DrainRow, LoadObservation, ModelFile, NodeRow, Placement

Call = Callable[[Database], Awaitable[object]]


async def lead(database: Database) -> None:
    leadership = database.leadership()
    await leadership.acquire("another")
    await leadership.release()


CALLS: dict[str, Call] = {
    "models.add": lambda d: d.models.add(a_model("other"), []),
    "models.get": lambda d: d.models.get("tiny"),
    "models.all": lambda d: d.models.all(),
    "models.files": lambda d: d.models.files("model-tiny", with_content=True),
    "models.manifest": lambda d: d.models.manifest("model-tiny"),
    "models.bind_chunks": lambda d: d.models.bind_chunks("model-tiny", {"a": ("x:aa",)}),
    "models.delete": lambda d: d.models.delete("tiny"),
    "nodes.leave": lambda d: d.nodes.leave("nowhere", "boot-1"),
    "nodes.register": lambda d: d.nodes.register(NodeRow(name="a", boot_id="b"), replaces=None),
    "nodes.get": lambda d: d.nodes.get("a"),
    "nodes.all": lambda d: d.nodes.all(),
    "instances.desire": lambda d: d.instances.desire(an_instance(term=99)),
    "instances.record": lambda d: d.instances.record("instance-1", InstanceState.READY),
    "instances.live": lambda d: d.instances.live(),
    "instances.recent": lambda d: d.instances.recent(),
    "instances.prune": lambda d: d.instances.prune(keep_s=1),
    "nodes.drain": lambda d: d.nodes.drain(DrainRow(node="a", term=99)),
    "nodes.undrain": lambda d: d.nodes.undrain("a", term=99),
    "nodes.drains": lambda d: d.nodes.drains(),
    "decisions.add": lambda d: d.decisions.add(a_decision()),
    "decisions.conclude": lambda d: d.decisions.conclude("instance-1", Outcome(load_s=1, engine_s=1, total_s=2)),
    "decisions.of_model": lambda d: d.decisions.of_model("model-tiny"),
    "decisions.of_instance": lambda d: d.decisions.of_instance("instance-1"),
    "decisions.concluded": lambda d: d.decisions.concluded(),
    "decisions.prune": lambda d: d.decisions.prune(keep_s=1),
    "tiers.place": lambda d: d.tiers.place(Placement(model_id="m", node="a", tier=Tier.SSD, held_bytes=1)),
    "tiers.placements": lambda d: d.tiers.placements(),
    "tiers.sample": lambda d: d.tiers.sample("a", [TierStatus(tier=Tier.SSD, capacity_bytes=1, used_bytes=0)]),
    "tiers.links": lambda d: d.tiers.links(),
    "tiers.latest": lambda d: d.tiers.latest(),
    "tiers.observe": lambda d: d.tiers.observe(
        LoadObservation(model_id="m", node="a", source=Tier.SSD, read_bytes=1, load_ms=1, wait_ms=1)
    ),
    "tiers.observations": lambda d: d.tiers.observations(),
    "tiers.prune": lambda d: d.tiers.prune(keep_s=1),
    "leadership.acquire": lead,
    "ready": lambda d: d.ready(),
}


async def outcomes(database: Database) -> dict[str, str]:
    found = {}
    for name, call in CALLS.items():
        try:
            await call(database)
            found[name] = "answered"
        except DatabaseUnavailable as error:
            found[name] = "retry" if error.retryable else "give up"
    return found


async def test_every_call_says_that_memory_is_down_and_works_again_after() -> None:
    database = MemoryDatabase()
    await database.models.add(a_model(), [])
    leader = database.leadership()
    assert await leader.acquire("first") == 1
    database.go_down()
    assert await outcomes(database) == dict.fromkeys(CALLS, "retry")
    with pytest.raises(LeadershipLost):
        await leader.check()
    database.come_up()
    assert await outcomes(database) == dict.fromkeys(CALLS, "answered")


async def test_every_call_says_that_a_killed_postgres_is_gone_and_works_again_after_a_restart(
    postgres_server: RestartableServer,
) -> None:
    database = await PgDatabase.connect(postgres_server.url)
    await database.models.add(a_model(), [])
    leader, successor = database.leadership(), database.leadership()
    assert await leader.acquire("first") == 1
    postgres_server.kill()
    assert await outcomes(database) == dict.fromkeys(CALLS, "retry")
    with pytest.raises(LeadershipLost):
        await leader.check()
    postgres_server.start()
    assert await database.models.get("tiny") == a_model()
    assert await successor.acquire("second") == 2
    await successor.release()
    assert await outcomes(database) == dict.fromkeys(CALLS, "answered")
    await database.close()


async def test_connections_that_died_with_the_server_are_replaced_unseen(postgres_server: RestartableServer) -> None:
    database = await PgDatabase.connect(postgres_server.url)
    await asyncio.gather(*(database.ready() for _ in range(5)))
    postgres_server.kill()
    postgres_server.start()
    await asyncio.gather(*(database.ready() for _ in range(10)))
    await database.close()


async def test_a_query_in_hand_when_the_server_is_killed_is_unavailable(postgres_server: RestartableServer) -> None:
    database = await PgDatabase.connect(postgres_server.url)
    blocker = await asyncpg.connect(postgres_server.url)
    await blocker.execute("BEGIN; LOCK TABLE models")
    reading = asyncio.create_task(database.models.all())
    while not await execute(postgres_server.url, "SELECT 1 FROM pg_locks WHERE NOT granted"):
        await asyncio.sleep(0.01)
    postgres_server.kill()
    with pytest.raises(DatabaseUnavailable):
        await reading
    blocker.terminate()
    postgres_server.start()
    assert await database.models.all() == []
    await database.close()


async def test_a_server_that_is_still_starting_is_waited_for(postgres_server: RestartableServer) -> None:
    postgres_server.kill()
    connecting = asyncio.create_task(PgDatabase.connect(postgres_server.url))
    await asyncio.sleep(0.5)
    assert not connecting.done()
    postgres_server.start()
    database = await connecting
    await database.ready()
    await database.close()


async def test_a_server_that_never_comes_is_given_up(postgres_server: RestartableServer) -> None:
    postgres_server.kill()
    with pytest.raises(DatabaseUnavailable):
        await PgDatabase.connect(postgres_server.url, timeout_s=0.5)
    postgres_server.start()


@pytest.mark.timeout(90)
async def test_a_frozen_server_is_unavailable_within_a_bound_and_works_again_once_thawed(
    postgres_server: RestartableServer,
) -> None:
    database = await PgDatabase.connect(postgres_server.url)
    leader = database.leadership()
    await leader.acquire("first")
    children = Path(f"/proc/{postgres_server.pid}/task/{postgres_server.pid}/children").read_text().split()
    frozen = [postgres_server.pid, *map(int, children)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(40):
            with pytest.raises(LeadershipLost):
                await leader.check()
            with pytest.raises(DatabaseUnavailable):
                await database.models.all()
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(20):
        assert await database.models.all() == []
    await database.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg"])
async def test_both_spellings_of_the_scheme_connect(postgres_url: str, scheme: str) -> None:
    database = await PgDatabase.connect(postgres_url.replace("postgresql", scheme, 1))
    await database.ready()
    await database.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("postgresql:", "mysql:"),
        lambda url: "postgres.example",
        lambda url: url.replace("stoker:", "stoker:not-", 1),
        lambda url: url + "_missing",
        lambda url: url.rpartition(":")[0] + ":port/x",
    ],
    ids=["scheme", "no scheme", "password", "database", "port"],
)
async def test_a_url_that_cannot_work_names_its_setting_at_once(
    postgres_url: str, change: Callable[[str], str]
) -> None:
    with pytest.raises(InvalidSettings, match="STOKER_POSTGRES_URL") as caught:
        await PgDatabase.connect(change(postgres_url))
    assert "of%20the%20tests" not in str(caught.value)
    assert "of the tests" not in str(caught.value)


async def test_more_callers_than_connections_wait_their_turn(postgres_url: str) -> None:
    database = await PgDatabase.connect(postgres_url, pool_size=2)
    await asyncio.gather(*(database.models.add(a_model(f"m{n}"), []) for n in range(30)))
    assert len(await database.models.all()) == 30
    await database.close()


async def test_a_cancelled_call_happens_wholly_or_not_at_all_and_leaves_the_pool_whole(postgres_url: str) -> None:
    database = await PgDatabase.connect(postgres_url, pool_size=1)
    for delay_ms in range(8):
        adding = asyncio.create_task(database.models.add(a_model(), [ModelFile(path="a", size_bytes=1)]))
        await asyncio.sleep(delay_ms / 1000)
        adding.cancel()
        await asyncio.wait([adding])
        added = [model.name for model in await database.models.all()]
        assert len(added) == len(await database.models.files("model-tiny", with_content=False))
        for name in added:
            await database.models.delete(name)
    await database.close()

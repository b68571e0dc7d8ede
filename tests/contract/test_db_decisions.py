from __future__ import annotations

from dataclasses import dataclass

import asyncpg
import pytest
from msgspec.structs import replace
from tests.support.databases import DatabaseKind, a_decision

from stoker_contracts.decisions import Outcome
from stoker_contracts.models import Tier
from stoker_db.ports import Database

OUTCOME = Outcome(queue_s=0.1, load_s=0.5, engine_s=1.0, total_s=1.6, source=Tier.PEER, origin="node-b")


async def test_a_decision_comes_back_as_it_was_made_with_the_time_of_the_database(database: Database) -> None:
    await database.decisions.add(a_decision())
    [record] = await database.decisions.of_model("model-tiny")
    assert record.made_at is not None
    assert replace(record, made_at=None) == a_decision()
    assert await database.decisions.of_instance("instance-1") == record


async def test_what_is_not_known_is_empty(database: Database) -> None:
    await database.decisions.add(a_decision(instance_id=""))
    assert await database.decisions.of_model("another") == []
    assert await database.decisions.of_instance("instance-1") is None
    assert await database.decisions.of_instance("") is None
    assert await database.decisions.concluded() == []


async def test_a_decision_that_chose_nothing_is_kept_with_its_reason(database: Database) -> None:
    nothing = replace(a_decision(instance_id=""), options=(), weighed=0, chosen=None, reason="it fits nowhere")
    await database.decisions.add(nothing)
    [record] = await database.decisions.of_model("model-tiny")
    assert (record.options, record.chosen, record.reason) == ((), None, "it fits nowhere")


async def test_adding_a_decision_again_changes_nothing(database: Database) -> None:
    await database.decisions.add(a_decision())
    assert await database.decisions.conclude("instance-1", OUTCOME)
    before = await database.decisions.of_model("model-tiny")
    await database.decisions.add(replace(a_decision(), reason="another"))
    assert await database.decisions.of_model("model-tiny") == before


async def test_what_happened_is_stored_once_beside_the_decision_that_started_it(database: Database) -> None:
    for number in range(3):
        await database.decisions.add(a_decision(f"decision-{number}", instance_id=f"instance-{number}"))
    await database.decisions.add(a_decision("decision-3", instance_id=""))
    assert await database.decisions.conclude("instance-1", OUTCOME)
    assert not await database.decisions.conclude("instance-1", replace(OUTCOME, failure="it died an hour later"))
    assert not await database.decisions.conclude("instance-9", OUTCOME)
    assert not await database.decisions.conclude("", OUTCOME)
    [record] = await database.decisions.concluded()
    assert (record.decision_id, record.outcome) == ("decision-1", OUTCOME)
    assert [r.outcome for r in await database.decisions.of_model("model-tiny") if r.decision_id != "decision-1"] == [
        None,
        None,
        None,
    ]


async def test_decisions_come_newest_first_and_no_more_than_asked_for(database: Database) -> None:
    for number in range(4):
        await database.decisions.add(a_decision(f"decision-{number}", instance_id=f"instance-{number}"))
        await database.decisions.conclude(f"instance-{number}", OUTCOME)
    await database.decisions.add(a_decision("decision-9", model_id="another", instance_id=""))
    newest = [f"decision-{number}" for number in (3, 2, 1, 0)]
    assert [r.decision_id for r in await database.decisions.of_model("model-tiny")] == newest
    assert [r.decision_id for r in await database.decisions.of_model("model-tiny", 2)] == newest[:2]
    assert [r.decision_id for r in await database.decisions.concluded(3)] == newest[:3]


async def test_pruning_forgets_what_was_decided_long_ago(database_kind: DatabaseKind) -> None:
    decisions = database_kind.database.decisions
    await decisions.add(a_decision("old", instance_id="instance-old"))
    await database_kind.age(3600)
    await decisions.add(a_decision("new", instance_id="instance-new"))
    assert await decisions.prune(keep_s=7200) == 0
    assert await decisions.prune(keep_s=1800) == 1
    assert [r.decision_id for r in await decisions.of_model("model-tiny")] == ["new"]
    assert await decisions.of_instance("instance-old") is None


async def test_all_clients_see_the_same_decisions(database_kind: DatabaseKind) -> None:
    await database_kind.database.decisions.add(a_decision())
    found = await database_kind.other.decisions.of_model("model-tiny")
    assert found == await database_kind.database.decisions.of_model("model-tiny") != []


@dataclass(frozen=True)
class Query:
    index: str
    sql: str


@pytest.mark.parametrize(
    "query",
    [
        Query(
            "ix_decisions_instance_id",
            "UPDATE decisions SET outcome = '{}' WHERE instance_id <> '' AND instance_id = 'i'",
        ),
        Query(
            "ix_decisions_concluded", "SELECT * FROM decisions WHERE outcome IS NOT NULL ORDER BY made_at DESC LIMIT 9"
        ),
        Query("ix_decisions_model_id", "SELECT * FROM decisions WHERE model_id = 'm' ORDER BY made_at DESC LIMIT 9"),
    ],
    ids=lambda query: query.index,
)
async def test_decisions_are_found_by_an_index_however_many_are_history(postgres_url: str, query: Query) -> None:
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("SET enable_seqscan = off")
    plan = await connection.fetch(f"EXPLAIN {query.sql}")
    await connection.close()
    assert any(query.index in line[0] for line in plan), plan

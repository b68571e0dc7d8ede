"""One suite for every implementation of the database ports: what each test needs beyond the ports themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import asyncpg
import pytest

from stoker_contracts.decisions import DecisionRecord, OptionRecord, StagePrediction, StartupPrediction
from stoker_contracts.models import EngineKind, InstanceState, ModelSpec, Tier
from stoker_core.clock import ManualClock
from stoker_db.memory import MemoryDatabase, MemoryLeadership
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, InstanceRow, Leadership


class DatabaseKind(Protocol):
    """database: empty.  other: a second client of the same data."""

    database: Database
    other: Database

    async def age(self, seconds: float) -> None:
        """Make the samples, observations, instances and decisions there are that much older."""
        ...

    async def cut(self, leadership: Leadership) -> None:
        """Cut the connection that holds the leader's lock."""
        ...


class MemoryKind:
    def __init__(self) -> None:
        self._clock = ManualClock()
        shared = MemoryDatabase(self._clock)
        self.database: Database = shared
        self.other: Database = shared

    async def age(self, seconds: float) -> None:
        self._clock.advance(seconds)

    async def cut(self, leadership: Leadership) -> None:
        assert isinstance(leadership, MemoryLeadership)
        leadership.break_connection()


class PostgresKind:
    def __init__(self, url: str, database: PgDatabase, other: PgDatabase) -> None:
        self._url = url
        self.database: Database = database
        self.other: Database = other

    async def age(self, seconds: float) -> None:
        stamps = {
            "tier_metrics": "sampled_at",
            "link_metrics": "sampled_at",
            "load_observations": "observed_at",
            "instances": "created_at",
            "decisions": "made_at",
        }
        for table, column in stamps.items():
            await execute(self._url, f"UPDATE {table} SET {column} = {column} - interval '{seconds} seconds'")

    async def cut(self, leadership: Leadership) -> None:
        gone = await execute(
            self._url, "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        )
        assert gone == [(True,)]


async def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement beside the repositories; its rows."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


@pytest.fixture(params=["memory", "postgres"])
async def database_kind(request: pytest.FixtureRequest) -> AsyncIterator[DatabaseKind]:
    if request.param == "memory":
        yield MemoryKind()
        return
    url: str = request.getfixturevalue("postgres_url")
    database, other = await PgDatabase.connect(url), await PgDatabase.connect(url)
    try:
        yield PostgresKind(url, database, other)
    finally:
        await database.close()
        await other.close()


@pytest.fixture
def database(database_kind: DatabaseKind) -> Database:
    """Empty; once in memory, once on Postgres."""
    return database_kind.database


def a_model(name: str = "tiny", *, model_id: str = "") -> ModelSpec:
    """No field has its default, so that a field which gets lost shows."""
    return ModelSpec(
        model_id=model_id or f"model-{name}",
        name=name,
        source=f"file:///models/{name}",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        weight_bytes=269_000_000,
        max_model_len=2048,
        vocab_size=49152,
        kv_bytes_per_token=23040,
        kv_cache_bytes=64 << 20,
        slots=4,
        engine=EngineKind.SIM,
        keep_alive_s=1.5,
        queue_max=3,
        wait_s=2.5,
    )


def an_instance(
    instance_id: str = "instance-1",
    *,
    term: int = 0,
    desired: InstanceState = InstanceState.READY,
    actual: InstanceState = InstanceState.STARTING,
    reason: str = "",
) -> InstanceRow:
    return InstanceRow(
        instance_id=instance_id,
        model_id="model-tiny",
        node="node-a",
        boot_id="boot-1",
        devices=(0, 1),
        desired=desired,
        actual=actual,
        term=term,
        reason=reason,
    )


def an_option(node: str = "node-a", *, load_s: float = 0.5) -> OptionRecord:
    return OptionRecord(
        node=node,
        devices=(0, 1),
        source=Tier.PEER,
        origin="node-b",
        how="free",
        startup=StartupPrediction(
            queue_s=0.25,
            room_s=0.0,
            load_s=load_s,
            engine_s=1.25,
            total_s=1.5 + load_s,
            spread=0.1,
            stages=(StagePrediction(name="peer:node-b", size_bytes=269_000_000, seconds=load_s),),
        ),
    )


def a_decision(
    decision_id: str = "decision-1", *, model_id: str = "model-tiny", instance_id: str = "instance-1"
) -> DecisionRecord:
    return DecisionRecord(
        decision_id=decision_id,
        term=3,
        model_id=model_id,
        instance_id=instance_id,
        options=(an_option(), an_option("node-c", load_s=4.0)),
        weighed=12,
        reason="the least startup time",
        chosen=0,
    )

"""How far predictions were off, for the metrics: from the memory database."""

from __future__ import annotations

import pytest
from tests.support.databases import a_decision

from stoker_contracts.decisions import Outcome
from stoker_core.clock import ManualClock
from stoker_db.memory import MemoryDatabase
from stoker_gateway.accuracy import REFRESH_S, Accuracies, Accuracy


async def start(database: MemoryDatabase, number: int, *, total_s: float, failure: str = "") -> None:
    """One of which 2 s were predicted, and of its load 0.75 s."""
    await database.decisions.add(a_decision(f"d{number}", instance_id=f"i{number}"))
    outcome = Outcome(queue_s=0.0, load_s=0.75, engine_s=total_s - 0.75, total_s=total_s, failure=failure)
    await database.decisions.conclude(f"i{number}", outcome)


async def test_errors_are_quantiles_of_starts_that_succeeded() -> None:
    database = MemoryDatabase()
    for number, total_s in enumerate((1.0, 2.0, 4.0)):  # off by 1, 0 and a half
        await start(database, number, total_s=total_s)
    await start(database, 9, total_s=100.0, failure="it died")
    found = await Accuracies(database.decisions, ManualClock()).read()
    assert found.starts == 3
    assert found.errors == {
        ("total", 0.5): pytest.approx(0.5),
        ("total", 0.9): pytest.approx(1.0),
        ("load", 0.5): pytest.approx(0.0),
        ("load", 0.9): pytest.approx(0.0),
    }


async def test_without_starts_there_is_no_error() -> None:
    assert await Accuracies(MemoryDatabase().decisions, ManualClock()).read() == Accuracy(0, {})


async def test_what_was_read_last_holds_for_a_while_and_while_the_database_is_away() -> None:
    database, clock = MemoryDatabase(), ManualClock()
    accuracies = Accuracies(database.decisions, clock)
    await start(database, 1, total_s=2.0)
    first = await accuracies.read()
    await start(database, 2, total_s=2.0)
    assert await accuracies.read() == first
    clock.advance(REFRESH_S)
    database.go_down()
    assert await accuracies.read() == first
    database.come_up()
    clock.advance(REFRESH_S)
    assert (await accuracies.read()).starts == 2

"""A worker's answers to leaders, where its disk takes nothing."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.worker.test_worker_state import state

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import ask
from stoker_contracts import subjects
from stoker_contracts.control import AnnounceTerm, Failed, TermReply
from stoker_core.clock import ManualClock, SystemClock
from stoker_core.errors import StorageFailed
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import NodeRow
from stoker_worker.app import register
from stoker_worker.handlers import Handlers
from stoker_worker.loops import StatusReporter


class FullDisk:
    def load(self) -> int:
        return 3

    def save(self, term: int) -> None:
        raise OSError(28, "No space left on device")


async def test_a_term_that_cannot_be_remembered_is_refused_and_not_obeyed_the_second_time_either() -> None:
    bus, worker = MemoryBroker().connect(), state(term=3)
    reporter = StatusReporter(bus, worker, SystemClock(), lambda _: True)
    handlers = Handlers(bus, worker, None, None, FullDisk(), reporter)  # type: ignore[arg-type]
    await bus.subscribe(subjects.worker_term("n"), handlers.term)
    for _ in range(2):
        message = AnnounceTerm(term=4, leader_id="l")
        reply: TermReply = await ask(bus, subjects.worker_term("n"), message, TermReply, timeout_s=1)
        assert isinstance(reply, Failed)
        assert (reply.code, reply.retryable) == (StorageFailed.code, True)
    assert worker.term == 3


@pytest.mark.parametrize(("term", "code"), [(2, "stale_term"), (3, None)])
async def test_terms_that_are_known_need_no_disk(term: int, code: str | None) -> None:
    bus, worker = MemoryBroker().connect(), state(term=3)
    reporter = StatusReporter(bus, worker, SystemClock(), lambda _: True)
    handlers = Handlers(bus, worker, None, None, FullDisk(), reporter)  # type: ignore[arg-type]
    await bus.subscribe(subjects.worker_term("n"), handlers.term)
    message = AnnounceTerm(term=term, leader_id="l")
    reply: TermReply = await ask(bus, subjects.worker_term("n"), message, TermReply, timeout_s=1)
    assert (reply.code if isinstance(reply, Failed) else None) == code


async def test_a_registration_waits_for_a_bus_that_is_away_and_asks_the_holder_then() -> None:
    clock, database, broker = ManualClock(), MemoryDatabase(), MemoryBroker()
    await database.nodes.register(NodeRow(name="n", boot_id="old"), replaces=None)
    bus = broker.connect()
    broker.disconnect(bus)
    registering = asyncio.create_task(register(bus, database, NodeRow(name="n", boot_id="new"), clock))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not registering.done()
    broker.reconnect(bus)
    clock.advance(1)
    await registering
    row = await database.nodes.get("n")
    assert row is not None
    assert row.boot_id == "new"

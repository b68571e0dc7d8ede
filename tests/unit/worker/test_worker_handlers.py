"""A worker's answers to leaders, where its disk takes nothing."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.worker.test_worker_state import start, state

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import ask
from stoker_contracts import subjects
from stoker_contracts.control import AnnounceTerm, CommandReply, DrainNode, Failed, TermReply
from stoker_core.clock import ManualClock, SystemClock
from stoker_core.errors import StorageFailed
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import NodeRow
from stoker_worker.app import register
from stoker_worker.handlers import Handlers
from stoker_worker.loops import StatusReporter


class Disk:
    def load(self) -> int:
        return 3

    def save(self, term: int) -> None:
        return


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


@pytest.mark.parametrize(
    ("order", "code"),
    [
        (DrainNode(boot_id="b", term=3, draining=True), None),
        (DrainNode(boot_id="b", term=4, draining=True), None),
        (DrainNode(boot_id="b", term=2, draining=True), "stale_term"),
        (DrainNode(boot_id="earlier", term=3, draining=True), "wrong_boot"),
    ],
)
async def test_a_drained_worker_says_so_and_refuses_starts_if_the_order_is_its_leaders(
    order: DrainNode, code: str | None
) -> None:
    bus, worker = MemoryBroker().connect(), state(term=3)
    reporter = StatusReporter(bus, worker, SystemClock(), lambda _: True)
    handlers = Handlers(bus, worker, None, None, Disk(), reporter)  # type: ignore[arg-type]
    await bus.subscribe(subjects.worker_drain("n"), handlers.drain)
    reply: CommandReply = await ask(bus, subjects.worker_drain("n"), order, CommandReply, timeout_s=1)
    assert (reply.code if isinstance(reply, Failed) else None) == code
    assert reporter.status().draining is (code is None)
    assert (worker.check_start(start()) is not None) is (code is None)


async def test_a_drain_is_undone_but_a_worker_that_ends_goes_on_draining() -> None:
    bus, worker = MemoryBroker().connect(), state(term=3)
    reporter = StatusReporter(bus, worker, SystemClock(), lambda _: True)
    handlers = Handlers(bus, worker, None, None, Disk(), reporter)  # type: ignore[arg-type]
    await bus.subscribe(subjects.worker_drain("n"), handlers.drain)
    for draining in (True, False):
        order = DrainNode(boot_id="b", term=3, draining=draining)
        await ask(bus, subjects.worker_drain("n"), order, CommandReply, timeout_s=1)
        assert reporter.status().draining is draining
    assert worker.check_start(start()) is None
    worker.leaving = True
    order = DrainNode(boot_id="b", term=3, draining=False)
    await ask(bus, subjects.worker_drain("n"), order, CommandReply, timeout_s=1)
    assert (reporter.status().draining, reporter.status().leaving) == (True, True)
    assert worker.check_start(start()) is not None

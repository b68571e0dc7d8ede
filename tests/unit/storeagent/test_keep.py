"""The agent's end of what its worker keeps, against the worker's real end, and against bad ones that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.descriptors import descriptors_before, descriptors_open
from tests.support.keeping import contents, memory, worker
from tests.support.services import eventually

from stoker_contracts.codec import encode
from stoker_contracts.keeping import LINE_LIMIT_BYTES, Keeping, Kept, Loaded
from stoker_core.clock import ManualClock
from stoker_core.unix import Connection, accept, close, listen
from stoker_storeagent import keep as module
from stoker_storeagent.keep import PoolKeep, Taken
from stoker_storeagent.orphans import WORKER_GONE_S, Orphan, Orphans
from stoker_storeagent.table import ResidentRecord


@dataclass
class Rig:
    """The agents of one node, one after another."""

    path: Path
    clock: ManualClock = field(default_factory=ManualClock)
    ended: list[Orphan] = field(default_factory=list)

    def keep(self) -> PoolKeep:
        return PoolKeep(self.path, boot_id="b", clock=self.clock, jitter=lambda: 0.5)

    async def take(self, timeout_s: float = 5.0) -> tuple[tuple[str, ...], list[str]] | None:
        """What the next agent would find: who loads, and the contents of what was kept."""
        keep = self.keep()
        taken = await keep.take(timeout_s=timeout_s)
        keep.close()
        return None if taken is None else (taken.loading, read(taken))

    @contextlib.asynccontextmanager
    async def running(self, keep: PoolKeep, *holders: str) -> AsyncIterator[None]:
        """Its part, with a resident that `holders` may read, who all still start."""
        pool, table = memory("pool"), memory("table")
        record = ResidentRecord(model_id="m", chunks=(1,), complete=True, holders=holders)
        part = keep.part((pool, table), Orphans([record], holders), self.ended.extend)
        running = asyncio.create_task(part.run())  # type: ignore[arg-type]
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled(), running.exception()
            os.close(pool)
            os.close(table)

    async def passes(self, seconds: float) -> None:
        """Time, a tenth of a second after another, so that what wakes up meanwhile goes on."""
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            for _ in range(5):
                await asyncio.sleep(0)


def read(taken: Taken) -> list[str]:
    found = [contents(taken.pool_fd), contents(taken.table_fd)]
    taken.close()
    return found


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """No descriptor may stay open."""
    before = descriptors_before()
    yield Rig(tmp_path / "keeper.sock")
    assert descriptors_open() == before


async def test_without_a_worker_there_is_nothing_to_take_and_no_waiting(rig: Rig):
    assert await rig.take(timeout_s=1e9) is None
    listen(rig.path, setting="S", who="dead worker").close()
    assert await rig.take(timeout_s=1e9) is None


async def test_what_an_agent_gave_the_next_one_takes_with_who_loads(rig: Rig):
    async with worker(rig.path, "i-1") as kept:
        assert await rig.take() is None
        async with rig.running(rig.keep()):
            await eventually(lambda: bool(kept.keeper._kept))
        assert await rig.take() == (("i-1",), ["pool", "table"])


async def test_what_was_dropped_is_there_no_more(rig: Rig):
    async with worker(rig.path, "i-1") as kept:
        async with rig.running(rig.keep()):
            await eventually(lambda: bool(kept.keeper._kept))
        keep = rig.keep()
        taken = await keep.take(timeout_s=5)
        assert taken
        kept.ended("i-1")  # that message comes before the answer, or after
        await keep.drop()
        taken.close()
        keep.close()
        assert await rig.take() is None
    await keep.drop()


async def test_an_orphan_ends_with_its_start_also_if_that_was_before_anybody_listened(rig: Rig):
    async with worker(rig.path, "i-1", "i-2") as kept:
        keep = rig.keep()
        await keep.take(timeout_s=5)
        kept.ended("i-1")
        async with rig.running(keep, "i-1", "i-2"):
            await eventually(lambda: rig.ended == [Orphan(0, "i-1")])
            kept.ended("i-2")
            await eventually(lambda: rig.ended == [Orphan(0, "i-1"), Orphan(0, "i-2")])


async def test_a_new_worker_gets_the_pool_and_ends_the_orphans_of_the_one_before(rig: Rig):
    async with worker(rig.path, "i-1"):
        keep = rig.keep()
        await keep.take(timeout_s=5)
    async with rig.running(keep, "i-1"):
        await rig.passes(2)
        assert rig.ended == []
        async with worker(rig.path) as other:
            await rig.passes(2)
            await eventually(lambda: bool(other.keeper._kept))
            assert rig.ended == [Orphan(0, "i-1")]
            assert await rig.take() == ((), ["pool", "table"])


async def test_orphans_end_a_while_after_their_worker(rig: Rig):
    async with worker(rig.path, "i-1"):
        keep = rig.keep()
        await keep.take(timeout_s=5)
    async with rig.running(keep, "i-1"):
        await rig.passes(WORKER_GONE_S - 0.5)
        assert rig.ended == []
        await rig.passes(3)
        assert rig.ended == [Orphan(0, "i-1")]


async def test_a_connection_that_breaks_costs_no_orphan_and_the_pool_is_offered_anew(rig: Rig):
    async with worker(rig.path, "i-1", "i-2") as kept:
        keep = rig.keep()
        await keep.take(timeout_s=5)
        async with rig.running(keep, "i-1", "i-2"):
            await eventually(lambda: bool(kept.keeper._kept))
            assert await rig.take() is not None, "a second agent takes the connection over"
            kept.ended("i-1")
            await rig.passes(2 * WORKER_GONE_S)
            await eventually(lambda: kept.keeper._agent is not None)
            assert rig.ended == [Orphan(0, "i-1")]
            kept.ended("i-2")
            await eventually(lambda: len(rig.ended) == 2)


async def test_a_worker_that_listens_and_does_not_answer_may_be_alive_so_its_instances_are_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    async with worker(rig.path, "i-1"):
        keep = rig.keep()
        await keep.take(timeout_s=5)
    async with rig.running(keep, "i-1"):
        await rig.passes(2)
        listener = listen(rig.path, setting="S", who="worker")
        for _ in range(2):
            await rig.passes(1.5)
            (await asyncio.wait_for(accept(listener), 10)).close()
        await rig.passes(WORKER_GONE_S)
        assert rig.ended == []
        close(listener)
        await eventually(lambda: bool(rig.clock._sleepers))
        await rig.passes(2 * WORKER_GONE_S)
        await eventually(lambda: rig.ended == [Orphan(0, "i-1")])


@contextlib.asynccontextmanager
async def bad_worker(path: Path, *answers: tuple[bytes, int]) -> AsyncIterator[None]:
    """Says these lines with so many descriptors to everybody at once, and nothing more."""
    listener = listen(path, setting="S", who="worker")
    said: list[Connection] = []

    async def serve() -> None:
        while True:
            said.append(Connection(await accept(listener), line_bytes_max=LINE_LIMIT_BYTES))
            for line, descriptors in answers:
                await said[-1].send(line, [0] * descriptors)

    serving = asyncio.create_task(serve())
    try:
        yield
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        for connection in said:
            connection.close()
        close(listener)


@pytest.mark.parametrize(
    ("line", "descriptors"),
    [
        (encode(Kept(kept=True)), 0),
        (encode(Kept(kept=True)), 1),
        (encode(Kept(kept=True)), 3),
        (encode(Kept()), 2),
        (encode(Keeping()), 0),
        (encode(Loaded(instance_id="i")), 2),
        (b"\xff", 2),
        (b"x" * (LINE_LIMIT_BYTES + 1), 0),
    ],
)
async def test_from_a_worker_that_breaks_the_protocol_nothing_is_taken(rig: Rig, line: bytes, descriptors: int):
    async with bad_worker(rig.path, (line, descriptors)):
        assert await rig.take() is None


async def test_a_worker_that_does_not_answer_is_waited_for_no_longer_than_asked(rig: Rig):
    async with bad_worker(rig.path):
        assert await rig.take(timeout_s=0.05) is None


async def test_a_worker_that_answers_no_drop_is_left(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    async with bad_worker(rig.path, (encode(Kept(kept=True)), 2)):
        keep = rig.keep()
        taken = await keep.take(timeout_s=5)
        assert taken
        taken.close()
        await keep.drop()


async def test_a_cancelled_take_leaves_nothing_open(rig: Rig):
    async with bad_worker(rig.path):
        taking = asyncio.create_task(rig.keep().take(timeout_s=60))
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        assert taking.cancelled()


async def test_a_busy_worker_is_one_that_does_not_answer(rig: Rig):
    listener = listen(rig.path, setting="S", who="worker", backlog=0)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(rig.path))
        assert await rig.take() is None
    close(listener)

"""What the worker keeps for a storage agent, over its real socket; the test plays the agents."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.descriptors import descriptors_before, descriptors_open
from tests.support.keeping import Worker, contents, memory, worker
from tests.support.services import eventually

from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.keeping import LINE_LIMIT_BYTES, Drop, FromKeeper, Keep, KeeperHello, Keeping, Kept, Loaded
from stoker_core.unix import Connection
from stoker_worker import keeper as module


class Agent:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.connection = Connection(self.socket, line_bytes_max=LINE_LIMIT_BYTES, descriptors_max=2)

    async def say(self, message: Contract, *descriptors: int) -> None:
        await self.connection.send(encode(message), descriptors)

    async def hear(self) -> Contract | None:
        """None: it was cut."""
        try:
            line = await self.connection.line()
        except ConnectionResetError:
            return None
        return decode(FromKeeper, line) if line else None

    async def hello(self, boot_id: str = "b") -> Kept:
        await self.say(KeeperHello(boot_id=boot_id))
        kept = await self.hear()
        assert isinstance(kept, Kept)
        return kept

    def took(self) -> list[str]:
        """The contents of descriptors that came with the last message."""
        came = self.connection.descriptors()
        found = [contents(fd) for fd in came]
        for fd in came:
            os.close(fd)
        return found

    async def keep(self, *names: str) -> Contract | None:
        made = [memory(name) for name in names]
        try:
            await self.say(Keep(), *made)
        finally:
            for fd in made:
                os.close(fd)
        return await self.hear()


@contextlib.contextmanager
def agent(rig: Worker) -> Iterator[Agent]:
    made = Agent(rig.path)
    try:
        yield made
    finally:
        made.connection.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Worker]:
    """No descriptor of it may be open once it has ended."""
    before = descriptors_before()
    async with worker(tmp_path / "keeper.sock", "i-1", "i-2") as made:
        yield made
    assert descriptors_open() == before


async def test_what_an_agent_gives_the_next_one_gets(rig: Worker):
    with agent(rig) as first:
        assert await first.hello() == Kept(loading=("i-1", "i-2"), kept=False)
        assert await first.keep("pool", "table") == Keeping()
    for _ in range(2):
        with agent(rig) as following:
            assert (await following.hello()).kept
            assert following.took() == ["pool", "table"]


async def test_what_is_kept_is_replaced_and_dropped_without_anything_left_open(rig: Worker):
    with agent(rig) as only:
        await only.hello()
        before = descriptors_open()
        for _ in range(5):
            assert await only.keep("pool", "table") == Keeping()
            assert descriptors_open() == before + 2
        for _ in range(2):
            await only.say(Drop())
            assert await only.hear() == Keeping()
            assert descriptors_open() == before
    with agent(rig) as last:
        assert not (await last.hello()).kept
        assert last.took() == []


async def test_an_agent_is_told_once_of_each_that_starts_no_more_and_of_no_later_one(rig: Worker):
    with agent(rig) as only:
        await only.hello()
        rig.starting.append("i-3")
        rig.ended("i-3")
        rig.keeper.changed()
        rig.ended("i-2")
        assert await only.hear() == Loaded(instance_id="i-2")
        rig.ended("i-1")
        assert await only.hear() == Loaded(instance_id="i-1")
        assert await only.keep("pool", "table") == Keeping()


async def test_an_instance_that_ends_before_anybody_asked_is_not_named(rig: Worker):
    rig.ended("i-1")
    with agent(rig) as only:
        assert (await only.hello()).loading == ("i-2",)


async def test_a_newer_agent_takes_the_place_of_an_older_one(rig: Worker):
    with agent(rig) as old, agent(rig) as new:
        await old.hello("old")
        await old.keep("pool", "table")
        await new.hello("new")
        assert new.took() == ["pool", "table"]
        assert await old.hear() is None
        rig.ended("i-1")
        assert await new.hear() == Loaded(instance_id="i-1")


@pytest.mark.parametrize(
    ("line", "descriptors"),
    [
        (encode(Keep()), 0),
        (encode(Keep()), 1),
        (encode(Keep()), 3),
        (encode(Drop()), 1),
        (encode(Drop()), 2),
        (b"{}", 2),
        (b"\xff", 0),
        (b"", 2),
        (b"x" * (LINE_LIMIT_BYTES + 1), 0),
    ],
)
async def test_who_breaks_the_protocol_is_cut_and_what_is_kept_stays(rig: Worker, line: bytes, descriptors: int):
    with agent(rig) as good:
        await good.hello()
        await good.keep("pool", "table")
    with agent(rig) as bad:
        await bad.hello()
        assert bad.took()
        before = descriptors_open()
        await bad.connection.send(line, [0] * descriptors)
        assert await bad.hear() is None
        await eventually(lambda: descriptors_open() == before - 1, what="the worker's end closes, with all that came")
    with agent(rig) as good:
        assert (await good.hello()).kept
        assert good.took() == ["pool", "table"]


async def test_descriptors_that_come_with_the_greeting_are_closed(rig: Worker):
    with agent(rig) as bad:
        await bad.say(KeeperHello(boot_id="b"), 0, 0)
        assert isinstance(await bad.hear(), Kept)
        assert await bad.keep("pool", "table") is None


async def test_who_does_not_greet_is_cut_and_delays_nobody(rig: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HELLO_S", 0.1)
    with agent(rig) as silent, agent(rig) as good:
        assert await good.hello()
        assert await silent.hear() is None
        assert await good.keep("pool", "table") == Keeping()


async def test_an_agent_that_does_not_read_is_cut(rig: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SEND_S", 0.1)
    rig.starting[:] = [f"i-{n:030}" for n in range(1500)]
    with agent(rig) as deaf:
        await deaf.say(KeeperHello(boot_id="b"))
        await eventually(lambda: rig.keeper._agent is not None)
        rig.starting.clear()
        rig.keeper.changed()
        await eventually(lambda: rig.keeper._agent is None, what="it is cut: all those messages fit into no buffer")
    with agent(rig) as good:
        assert await good.hello() == Kept()


async def test_there_are_never_more_connections_than_the_limit(rig: Worker):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(agent(rig)) for _ in range(module.CONNECTIONS_MAX)]
        await eventually(lambda: rig.keeper._open == len(idle))
        further = stack.enter_context(agent(rig))
        assert await further.hear() is None
        idle[0].connection.close()
        await eventually(lambda: rig.keeper._open < len(idle))
        last = stack.enter_context(agent(rig))
        assert await last.hello()


async def test_what_is_kept_goes_with_the_worker(tmp_path: Path):
    before = descriptors_before()
    async with worker(tmp_path / "keeper.sock") as rig:
        with agent(rig) as only:
            await only.hello()
            await only.keep("pool", "table")
    assert descriptors_open() == before
    assert not rig.path.exists()

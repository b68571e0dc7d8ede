"""The bus in memory and on NATS under one face, so that one suite holds for both.

Fixtures:
    connect_bus  a function that opens a connection; closed after the test
    faulty_bus   the same as `.connect`, on a bus that `.cut()` takes down and `.mend()` brings back
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import pytest

from stoker_bus.memory import MemoryBroker, MemoryBus
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus

if TYPE_CHECKING:
    from tests.support.nats_server import NatsServer

Connect = Callable[[], Awaitable[Bus]]
PATIENCE_S = 30.0


async def eventually(condition: Callable[[], bool], what: str = "") -> None:
    """Wait until `condition` holds; fails after PATIENCE_S."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"did not happen within {PATIENCE_S:g} s: {what or condition}")


class Faulty(Protocol):
    async def connect(self) -> Bus: ...

    async def cut(self) -> None:
        """Take the bus away from everybody, without notice."""
        ...

    async def mend(self) -> None:
        """Bring it back; its stream kept what was appended."""
        ...


class _MemoryFaulty:
    def __init__(self) -> None:
        self._broker = MemoryBroker()
        self._buses: list[MemoryBus] = []

    async def connect(self) -> Bus:
        self._buses.append(self._broker.connect())
        return self._buses[-1]

    async def cut(self) -> None:
        for bus in self._buses:
            self._broker.disconnect(bus)

    async def mend(self) -> None:
        for bus in self._buses:
            self._broker.reconnect(bus)


class _NatsFaulty:
    def __init__(self, server: NatsServer) -> None:
        self._server = server

    async def connect(self) -> Bus:
        return await NatsBus.connect(self._server.url, name="test")

    async def cut(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def mend(self) -> None:
        await asyncio.to_thread(self._server.start)


class _Closing:
    """Closes what was opened, so that no test leaves a connection behind."""

    def __init__(self, faulty: Faulty) -> None:
        self._faulty = faulty
        self._opened: list[Bus] = []
        self.cut, self.mend = faulty.cut, faulty.mend

    async def connect(self) -> Bus:
        bus = await self._faulty.connect()
        self._opened.append(bus)
        return bus

    async def close(self) -> None:
        for bus in self._opened:
            await bus.close()


@pytest.fixture(params=["memory", "nats"])
def bus_opener(request: pytest.FixtureRequest) -> Connect:
    if request.param == "memory":
        return _MemoryFaulty().connect
    url = request.getfixturevalue("nats_url")

    async def open_nats() -> Bus:
        return await NatsBus.connect(url, name="test")

    return open_nats


@pytest.fixture
async def connect_bus(bus_opener: Connect) -> AsyncIterator[Connect]:
    opened: list[Bus] = []

    async def connect() -> Bus:
        opened.append(await bus_opener())
        return opened[-1]

    yield connect
    for bus in opened:
        await bus.close()


@pytest.fixture(params=["memory", "nats"])
def faulty_kind(request: pytest.FixtureRequest) -> Faulty:
    return _MemoryFaulty() if request.param == "memory" else _NatsFaulty(request.getfixturevalue("nats_server"))


@pytest.fixture
async def faulty_bus(faulty_kind: Faulty) -> AsyncIterator[Faulty]:
    closing = _Closing(faulty_kind)
    yield closing
    await closing.close()

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from stoker_cli.ports import HOST, choose, is_free
from stoker_core.clock import ManualClock
from stoker_core.errors import PortTaken


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as server:
        yield server


async def pick(port: int, clock: ManualClock, patience_s: float = 0.0) -> int:
    return await choose(port, what="the gateway", setting="STOKER_UP_GATEWAY_PORT", clock=clock, patience_s=patience_s)


async def test_a_taken_port_is_named_with_its_setting(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    with pytest.raises(PortTaken, match=rf"port {port} \(for the gateway\) is taken .* STOKER_UP_GATEWAY_PORT"):
        await pick(port, ManualClock())


async def test_zero_is_any_free_port() -> None:
    assert is_free(await pick(0, ManualClock()))


async def test_a_port_that_an_earlier_run_still_holds_is_waited_for(taken: socket.socket) -> None:
    clock, port = ManualClock(), taken.getsockname()[1]
    choosing = asyncio.create_task(pick(port, clock, patience_s=10.0))
    await asyncio.sleep(0)
    taken.close()
    clock.advance(0.1)
    assert await choosing == port


async def test_patience_ends(taken: socket.socket) -> None:
    clock = ManualClock()
    choosing = asyncio.create_task(pick(taken.getsockname()[1], clock, patience_s=10.0))
    await asyncio.sleep(0)
    clock.advance(10.0)
    with pytest.raises(PortTaken):
        await choosing

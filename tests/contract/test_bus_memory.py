"""The memory bus's controls for tests: faults of one connection at a time."""

from __future__ import annotations

import asyncio

import pytest

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import Bus, Message
from stoker_contracts.subjects import EVENTS_ALL, event
from stoker_core.clock import ManualClock
from stoker_core.errors import Disconnected, NoResponders


async def test_cutting_one_connection_leaves_the_others_connected() -> None:
    broker = MemoryBroker()
    cut, other = broker.connect(), broker.connect()
    heard: list[tuple[str, bytes]] = []

    async def hear_cut(message: Message) -> None:
        heard.append(("cut", message.data))

    async def hear_other(message: Message) -> None:
        heard.append(("other", message.data))

    await cut.subscribe("a", hear_cut)
    await other.subscribe("a", hear_other)
    broker.disconnect(cut)
    assert not cut.connected
    assert other.connected
    with pytest.raises(Disconnected):
        await cut.publish("a", b"")
    await other.publish("a", b"1")
    broker.reconnect(cut)
    assert (cut.reconnects, other.reconnects) == (1, 0)
    await other.publish("a", b"2")
    await cut.close()
    await other.close()
    assert sorted(heard) == [("cut", b"2"), ("other", b"1"), ("other", b"2")]


async def test_a_cut_responder_is_no_responder() -> None:
    broker = MemoryBroker()
    client, server = broker.connect(), broker.connect()

    async def silent(_: Message) -> None: ...

    await server.subscribe("service", silent, queue="q")
    broker.disconnect(server)
    with pytest.raises(NoResponders):
        await client.request("service", b"", timeout_s=1)
    await client.close()
    await server.close()


async def test_an_answer_to_a_client_cut_off_meanwhile_never_arrives() -> None:
    broker = MemoryBroker()
    client, server = broker.connect(), broker.connect()

    async def cut_and_answer(message: Message) -> None:
        broker.disconnect(client)
        broker.reconnect(client)
        await server.publish(message.reply, b"late")

    await server.subscribe("service", cut_and_answer)
    with pytest.raises(Disconnected):
        await client.request("service", b"", timeout_s=30)
    await client.close()
    await server.close()


async def test_reconnecting_what_is_connected_counts_nothing() -> None:
    broker = MemoryBroker()
    bus = broker.connect()
    broker.reconnect(bus)
    assert bus.reconnects == 0


async def test_events_bear_the_brokers_time() -> None:
    clock = ManualClock(start_s=1000.0)
    bus: Bus = MemoryBroker(clock).connect()
    await bus.append(event("node", "joined"), b"", message_id="1")
    [message] = [m async for m in bus.follow(EVENTS_ALL, since_sequence=1, follow=False)]
    assert message.time.timestamp() == 1000.0


async def test_a_request_may_be_cancelled_and_leaves_nothing_open() -> None:
    broker = MemoryBroker()
    bus = broker.connect()

    async def silent(_: Message) -> None: ...

    await bus.subscribe("silent", silent)
    task = asyncio.create_task(bus.request("silent", b"", timeout_s=30))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert broker.open_requests == 0
    await bus.close()

"""What every bus does when the link is lost and comes back: disconnects in memory, kill -9 of a real NATS server."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.support.buses import Faulty, eventually

from stoker_bus.port import Bus, Message
from stoker_contracts.subjects import EVENTS_ALL, event
from stoker_core.errors import Disconnected

EVENT = event("node", "joined")
NEVER_S = 60.0


async def outage(faulty_bus: Faulty, *buses: Bus) -> None:
    await faulty_bus.cut()
    await eventually(lambda: not any(bus.connected for bus in buses), "the loss is noticed")
    await faulty_bus.mend()
    await eventually(lambda: all(bus.connected for bus in buses), "the link comes back")


async def test_every_call_raises_while_there_is_no_connection_and_nothing_arrives_late(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    heard: list[bytes] = []

    async def handler(message: Message) -> None:
        heard.append(message.data)

    await bus.subscribe("late.>", handler)
    await faulty_bus.cut()
    await eventually(lambda: not bus.connected)
    for call in (
        bus.publish("late.a", b"published"),
        bus.request("late.a", b"requested", timeout_s=NEVER_S),
        bus.subscribe("late.b", handler),
        bus.append(EVENT, b"appended", message_id="lost"),
        anext(aiter(bus.follow(EVENTS_ALL))),
    ):
        with pytest.raises(Disconnected):
            await call
    await faulty_bus.mend()
    await eventually(lambda: bus.connected)
    await bus.publish("late.a", b"afterwards")
    await eventually(lambda: bool(heard))
    assert heard == [b"afterwards"]
    assert await bus.append(EVENT, b"first", message_id="kept") == 1


async def test_subscriptions_survive_an_outage(faulty_bus: Faulty) -> None:
    server, client = await faulty_bus.connect(), await faulty_bus.connect()
    heard: list[bytes] = []

    async def serve(message: Message) -> None:
        await server.publish(message.reply, b"answer to " + message.data)

    async def hear(message: Message) -> None:
        heard.append(message.data)

    await server.subscribe("service", serve, queue="team")
    await server.subscribe("status.*", hear)
    stopped = await server.subscribe("stopped", hear)
    await stopped.stop()
    for number in (1, 2):
        await outage(faulty_bus, server, client)
        assert server.reconnects == client.reconnects == number
        reply = await client.request("service", str(number).encode(), timeout_s=NEVER_S)
        assert reply.data == f"answer to {number}".encode()
        await client.publish("stopped", b"not this")
        await client.publish("status.a", str(number).encode())
        await eventually(lambda: len(heard) == number)  # noqa: B023 - awaited within the turn
    assert heard == [b"1", b"2"]


async def test_a_subscription_stopped_during_an_outage_stays_stopped(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    heard: list[bytes] = []

    async def hear(message: Message) -> None:
        heard.append(message.data)

    leaving = await bus.subscribe("a.leaving", hear)
    await bus.subscribe("a.staying", hear)
    await faulty_bus.cut()
    await eventually(lambda: not bus.connected)
    await leaving.stop()
    await faulty_bus.mend()
    await eventually(lambda: bus.connected)
    await bus.publish("a.leaving", b"no")
    await bus.publish("a.staying", b"yes")
    await eventually(lambda: bool(heard))
    assert heard == [b"yes"]


async def test_a_request_in_flight_fails_when_the_link_does_not_at_its_timeout(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    asked = asyncio.Event()

    async def silent(_: Message) -> None:
        asked.set()

    await bus.subscribe("silent", silent)
    request = asyncio.create_task(bus.request("silent", b"", timeout_s=NEVER_S))
    await asked.wait()
    started_s = time.monotonic()
    await faulty_bus.cut()
    with pytest.raises(Disconnected):
        await request
    assert time.monotonic() - started_s < NEVER_S / 2


async def test_what_was_delivered_before_an_outage_is_still_handled(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    gate = asyncio.Event()
    handled: list[bytes] = []
    arrived = asyncio.Event()

    async def slow(message: Message) -> None:
        arrived.set()
        await gate.wait()
        handled.append(message.data)

    await bus.subscribe("slow", slow)
    await bus.publish("slow", b"1")
    await arrived.wait()
    await outage(faulty_bus, bus)
    gate.set()
    await bus.publish("slow", b"2")
    await eventually(lambda: handled == [b"1", b"2"])


async def test_following_across_outages_loses_and_repeats_nothing(faulty_bus: Faulty) -> None:
    writer, reader = await faulty_bus.connect(), await faulty_bus.connect()
    seen: list[int] = []
    wrote = 0

    async def follow() -> None:
        async for message in reader.follow(EVENTS_ALL, since_sequence=1):
            seen.append(message.sequence)  # noqa: PERF401 - endless; read while it goes on

    async def write(count: int) -> None:
        nonlocal wrote
        for _ in range(count):
            wrote += 1
            assert await writer.append(EVENT, b"x", message_id=str(wrote)) == wrote

    await write(5)
    following = asyncio.create_task(follow())
    await eventually(lambda: len(seen) == 5)
    for _ in range(2):
        await outage(faulty_bus, writer, reader)
        await write(300)
        await eventually(lambda: len(seen) >= wrote)
    assert seen == list(range(1, wrote + 1))
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_a_follower_ends_with_an_error_when_its_bus_is_closed(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    await bus.append(EVENT, b"1", message_id="1")
    seen = asyncio.Event()

    async def follow() -> None:
        async for _ in bus.follow(EVENTS_ALL, since_sequence=1):
            seen.set()

    following = asyncio.create_task(follow())
    await seen.wait()
    await bus.close()
    with pytest.raises(Disconnected):
        await following


async def test_a_bus_closes_while_there_is_no_connection(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()

    async def ignore(_: Message) -> None: ...

    await bus.subscribe("a", ignore)
    await faulty_bus.cut()
    await eventually(lambda: not bus.connected)
    await bus.close()
    with pytest.raises(Disconnected):
        await bus.publish("a", b"")

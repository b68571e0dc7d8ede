"""What only a real NATS server can do to a bus."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.js import api
from tests.support.buses import eventually
from tests.support.nats_server import NatsServer, free_port

from stoker_bus import nats_link
from stoker_bus.nats import NatsBus, backoff_s
from stoker_bus.port import Message, StreamMessage
from stoker_contracts.subjects import EVENTS_ALL, EVENTS_STREAM, event
from stoker_core.errors import BusError, BusLost, BusRefused, Disconnected

EVENT = event("node", "joined")
NEVER_S = 60.0


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    bus = await NatsBus.connect(nats_server.url, name="test")
    yield bus
    await bus.close()


@pytest.fixture
async def admin(nats_url: str) -> AsyncIterator[Client]:
    client = Client()
    await client.connect(nats_url)
    yield client
    await client.close()


async def second_event(bus: NatsBus) -> StreamMessage:
    """Follows from the start, where one event is, and waits for another."""
    events = bus.follow(EVENTS_ALL, since_sequence=1)
    await anext(events)
    return await anext(events)


async def test_wrong_credentials_are_refused_at_once(nats_url: str) -> None:
    host = nats_url.rpartition("@")[2]
    started_s = time.monotonic()
    with pytest.raises(BusRefused) as caught:
        await NatsBus.connect(f"nats://test:wrong@{host}", name="test", timeout_s=NEVER_S)
    assert time.monotonic() - started_s < NEVER_S / 2
    assert host in caught.value.message
    assert "wrong" not in caught.value.message


async def test_no_server_is_disconnected_after_the_timeout() -> None:
    port = free_port()
    with pytest.raises(Disconnected, match=f"127.0.0.1:{port}"):
        await NatsBus.connect(f"nats://127.0.0.1:{port}", name="test", timeout_s=0.3)


async def test_connect_waits_for_a_server_that_comes_later(nats_server: NatsServer) -> None:
    nats_server.kill()
    connecting = asyncio.create_task(NatsBus.connect(nats_server.url, name="test", timeout_s=NEVER_S))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(nats_server.start)
    bus = await connecting
    assert bus.connected
    assert bus.reconnects == 0
    await bus.close()


async def test_connect_gives_up_on_what_is_no_nats_server() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Disconnected):
        await NatsBus.connect(f"nats://127.0.0.1:{port}", name="test", timeout_s=0.3)
    server.close()


async def test_an_orderly_restart_of_the_server_is_survived(nats_server: NatsServer, bus: NatsBus) -> None:
    await asyncio.to_thread(nats_server.stop)
    await eventually(lambda: not bus.connected)
    await asyncio.to_thread(nats_server.start)
    await eventually(lambda: bus.connected)
    assert await bus.append(EVENT, b"", message_id="1") == 1


async def test_a_frozen_server_counts_as_lost_and_comes_back(nats_server: NatsServer, bus: NatsBus) -> None:
    async def silent(_: Message) -> None: ...

    await bus.subscribe("silent", silent)
    request = asyncio.create_task(bus.request("silent", b"", timeout_s=NEVER_S))
    await asyncio.sleep(0.05)
    nats_server.freeze()
    with pytest.raises(Disconnected):
        await request
    assert not bus.connected
    with pytest.raises(Disconnected):
        await bus.publish("a", b"")
    nats_server.thaw()
    await eventually(lambda: bus.connected)
    assert bus.reconnects == 1


async def test_a_bus_thrown_out_by_the_server_comes_back_when_let_in(
    nats_server: NatsServer, bus: NatsBus, tmp_path: Path
) -> None:
    heard: list[bytes] = []

    async def hear(message: Message) -> None:
        heard.append(message.data)

    await bus.subscribe("a", hear)
    config = tmp_path / "nats" / "nats.conf"
    good = config.read_text()
    config.write_text(good.replace('user: "test"', 'user: "somebody-else"'))
    os.kill(nats_server.pid, signal.SIGHUP)
    await eventually(lambda: not bus.connected)
    await asyncio.sleep(0.3)
    with pytest.raises(Disconnected):
        await bus.publish("a", b"refused")
    config.write_text(good)
    os.kill(nats_server.pid, signal.SIGHUP)
    await eventually(lambda: bus.connected)
    await bus.publish("a", b"again")
    await eventually(lambda: heard == [b"again"])


async def test_a_broken_reconnect_is_an_error_and_not_silence(
    nats_server: NatsServer, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake in the program")

    await bus.append(EVENT, b"", message_id="1")
    following = asyncio.create_task(second_event(bus))
    await asyncio.wait([following], timeout=0.1)
    monkeypatch.setattr(nats_link.Link, "open", broken)
    nats_server.kill()
    with pytest.raises(BusLost, match="a mistake in the program"):
        await following
    with pytest.raises(BusLost):
        await bus.publish("a", b"")


async def test_without_jetstream_events_fail_readably_and_messages_work(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    nats_server.kill()
    config = tmp_path / "nats" / "nats.conf"
    text = config.read_text()
    start = text.index("jetstream {")
    config.write_text(text[:start] + text[text.index("}", start) + 1 :])
    await asyncio.to_thread(nats_server.start)
    bus = await NatsBus.connect(nats_server.url, name="test")
    with pytest.raises(BusError, match="JetStream is not enabled"):
        await bus.append(EVENT, b"", message_id="1")
    with pytest.raises(BusError, match="JetStream is not enabled"):
        await anext(aiter(bus.follow(EVENTS_ALL)))
    await bus.publish("a", b"")
    await bus.close()


async def test_following_goes_on_when_jetstream_was_away(nats_server: NatsServer, bus: NatsBus, tmp_path: Path) -> None:
    seen: list[int] = []

    async def follow() -> None:
        async for message in bus.follow(EVENTS_ALL, since_sequence=1):
            seen.append(message.sequence)  # noqa: PERF401 - endless; read while it goes on

    await bus.append(EVENT, b"", message_id="1")
    following = asyncio.create_task(follow())
    await eventually(lambda: seen == [1])
    config = tmp_path / "nats" / "nats.conf"
    text = config.read_text()
    start = text.index("jetstream {")
    config.write_text(text[:start] + text[text.index("}", start) + 1 :])
    for turn, content in enumerate((config.read_text(), text), start=1):
        config.write_text(content)
        await asyncio.to_thread(nats_server.kill)
        await asyncio.to_thread(nats_server.start)
        await eventually(lambda: bus.reconnects == turn)  # noqa: B023 - awaited within the turn
        await asyncio.sleep(0.3)
    assert await bus.append(EVENT, b"", message_id="2") == 2
    await eventually(lambda: seen == [1, 2])
    following.cancel()


async def test_the_stream_has_the_limits_it_should(nats_url: str, admin: Client) -> None:
    bus = await NatsBus.connect(nats_url, name="test")
    await bus.append(EVENT, b"", message_id="1")
    config = (await admin.jetstream().stream_info(EVENTS_STREAM)).config
    assert config.subjects == [EVENTS_ALL]
    assert config.storage == api.StorageType.FILE
    assert config.retention == api.RetentionPolicy.LIMITS
    assert config.discard == api.DiscardPolicy.OLD
    assert config.max_age == 7 * 24 * 3600
    assert config.max_bytes == 256 * 1024 * 1024
    assert config.duplicate_window == 120
    await bus.close()


async def test_a_stream_with_an_operators_limits_is_used_as_it_is(nats_url: str, admin: Client) -> None:
    await admin.jetstream().add_stream(name=EVENTS_STREAM, subjects=[EVENTS_ALL], max_bytes=1024 * 1024)
    bus = await NatsBus.connect(nats_url, name="test")
    assert await bus.append(EVENT, b"", message_id="1") == 1
    config = (await admin.jetstream().stream_info(EVENTS_STREAM)).config
    assert config.max_bytes == 1024 * 1024
    await bus.close()


async def test_a_deleted_stream_is_made_again(nats_server: NatsServer, bus: NatsBus) -> None:
    assert await bus.append(EVENT, b"old", message_id="1") == 1
    await nats_server.delete_events()
    assert await bus.append(EVENT, b"new", message_id="2") == 1
    await nats_server.delete_events()
    assert [m async for m in bus.follow(EVENTS_ALL, since_sequence=1, follow=False)] == []


async def test_following_goes_on_when_the_servers_store_was_lost(
    nats_server: NatsServer, bus: NatsBus, tmp_path: Path
) -> None:
    seen: list[bytes] = []

    async def follow() -> None:
        async for message in bus.follow(EVENTS_ALL, since_sequence=1):
            seen.append(message.data)  # noqa: PERF401 - endless; read while it goes on

    for n in range(3):
        await bus.append(EVENT, b"old", message_id=str(n))
    following = asyncio.create_task(follow())
    await eventually(lambda: len(seen) == 3)
    await asyncio.to_thread(nats_server.kill)
    shutil.rmtree(tmp_path / "nats" / "jetstream")
    await asyncio.to_thread(nats_server.start)
    await eventually(lambda: bus.connected)
    assert await bus.append(EVENT, b"new", message_id="n") == 1
    await eventually(lambda: seen == [b"old"] * 3 + [b"new"])
    following.cancel()


async def test_followers_leave_no_consumers_behind(nats_url: str, admin: Client) -> None:
    bus = await NatsBus.connect(nats_url, name="test")
    await bus.append(EVENT, b"", message_id="1")
    assert [m.sequence async for m in bus.follow(EVENTS_ALL, since_sequence=1, follow=False)] == [1]
    following = asyncio.create_task(second_event(bus))
    consumers = admin.jetstream().consumers_info
    while not await consumers(EVENTS_STREAM):
        await asyncio.sleep(0.01)
    following.cancel()
    async with asyncio.timeout(NEVER_S):
        while await consumers(EVENTS_STREAM):
            await asyncio.sleep(0.01)
    await bus.close()


async def test_a_cancelled_subscribe_leaves_the_link_working(nats_url: str) -> None:
    bus = await NatsBus.connect(nats_url, name="test")

    async def ignore(_: Message) -> None: ...

    for turns in range(6):
        subscribing = asyncio.create_task(bus.subscribe("a", ignore))
        for _ in range(turns):
            await asyncio.sleep(0)
        subscribing.cancel()
        await asyncio.wait([subscribing])
    heard = asyncio.Event()

    async def hear(_: Message) -> None:
        heard.set()

    await bus.subscribe("b", hear)
    await bus.publish("b", b"")
    await asyncio.wait_for(heard.wait(), NEVER_S)
    assert bus.reconnects == 0
    await bus.close()


def test_reconnects_back_off_with_jitter_and_a_ceiling() -> None:
    assert all(0.05 <= backoff_s(0) <= 0.1 for _ in range(100))
    assert all(1.0 <= backoff_s(n) <= 2.0 for n in (5, 50, 5000))
    assert len({backoff_s(9) for _ in range(100)}) > 50

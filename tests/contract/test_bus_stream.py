"""What every bus does with the event stream; run on the memory bus and on NATS."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from tests.support.buses import Connect, eventually

from stoker_bus.port import Bus, Message, StreamMessage
from stoker_contracts.subjects import EVENTS_ALL, event
from stoker_core.errors import BusError, MessageTooLarge

READY = event("instance", "ready")
JOINED = event("node", "joined")


async def replay(bus: Bus, subject: str = EVENTS_ALL, since: int | None = 1) -> list[StreamMessage]:
    return [m async for m in bus.follow(subject, since_sequence=since, follow=False)]


async def append(bus: Bus, *numbers: int, subject: str = READY) -> None:
    for n in numbers:
        await bus.append(subject, str(n).encode(), message_id=f"id-{n}")


class Follower:
    """Follows in a task of its own and keeps what it saw."""

    def __init__(self, bus: Bus, since: int | None = 1, subject: str = EVENTS_ALL) -> None:
        self.seen: list[StreamMessage] = []
        self._task = asyncio.create_task(self._run(bus, since, subject))

    async def _run(self, bus: Bus, since: int | None, subject: str) -> None:
        async for message in bus.follow(subject, since_sequence=since):
            self.seen.append(message)

    @property
    def data(self) -> list[bytes]:
        return [m.data for m in self.seen]

    async def stop(self) -> None:
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task


async def test_what_was_appended_is_replayed_in_order_with_its_place_and_time(connect_bus: Connect) -> None:
    bus, reader = await connect_bus(), await connect_bus()
    before = datetime.now(UTC)
    assert await bus.append(READY, b"one", message_id="1") == 1
    assert await bus.append(JOINED, b"two", message_id="2") == 2
    messages = await replay(reader)
    assert [(m.subject, m.data, m.sequence) for m in messages] == [(READY, b"one", 1), (JOINED, b"two", 2)]
    assert all(abs((m.time - before).total_seconds()) < 60 for m in messages)
    assert messages[0].headers == {}


async def test_a_repeated_message_id_is_stored_once(connect_bus: Connect) -> None:
    bus = await connect_bus()
    assert await bus.append(READY, b"one", message_id="same") == 1
    assert await bus.append(READY, b"one again", message_id="same") == 1
    assert await bus.append(READY, b"two", message_id="other") == 2
    assert [m.data for m in await replay(bus)] == [b"one", b"two"]


async def test_concurrent_appends_all_get_their_own_place(connect_bus: Connect) -> None:
    bus, other = await connect_bus(), await connect_bus()
    places = await asyncio.gather(*((bus if n % 2 else other).append(READY, b"", message_id=str(n)) for n in range(20)))
    assert sorted(places) == list(range(1, 21))


async def test_replay_begins_where_asked(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await append(bus, 1, 2, 3, 4)
    assert [m.data for m in await replay(bus, since=3)] == [b"3", b"4"]
    assert [m.data for m in await replay(bus, since=0)] == [b"1", b"2", b"3", b"4"]
    assert await replay(bus, since=5) == []
    assert await replay(bus, since=500) == []


async def test_replay_of_an_empty_stream_ends(connect_bus: Connect) -> None:
    assert await replay(await connect_bus()) == []


async def test_without_a_start_nothing_is_replayed(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await append(bus, 1, 2)
    assert await replay(bus, since=None) == []


async def test_replay_and_follow_choose_by_subject(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await append(bus, 1)
    await append(bus, 2, subject=JOINED)
    await append(bus, 3)
    await append(bus, 4, subject=JOINED)
    assert [m.data for m in await replay(bus, READY)] == [b"1", b"3"]
    assert [m.data for m in await replay(bus, event("*", "joined"))] == [b"2", b"4"]
    assert await replay(bus, event("tier", "filled")) == []


async def test_a_long_replay_is_complete(connect_bus: Connect) -> None:
    bus = await connect_bus()
    count = 600  # more than two batches
    for chunk in range(0, count, 100):
        await asyncio.gather(*(bus.append(READY, b"x" * 100, message_id=str(n)) for n in range(chunk, chunk + 100)))
    assert [m.sequence for m in await replay(bus)] == list(range(1, count + 1))


async def test_a_replay_ends_although_more_is_appended_meanwhile(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await append(bus, 1, 2, 3)
    seen = []
    async for message in bus.follow(EVENTS_ALL, since_sequence=1, follow=False):
        seen.append(message.sequence)
        await bus.append(READY, b"more", message_id=f"more-{message.sequence}")
    assert seen == [1, 2, 3]


async def test_following_goes_on_from_replay_to_what_comes(connect_bus: Connect) -> None:
    bus, reader = await connect_bus(), await connect_bus()
    await append(bus, 1, 2)
    follower = Follower(reader)
    await eventually(lambda: len(follower.seen) == 2)
    await append(bus, 3)
    await eventually(lambda: len(follower.seen) == 3)
    await append(bus, *range(4, 40))
    await eventually(lambda: len(follower.seen) == 39)
    assert [m.sequence for m in follower.seen] == list(range(1, 40))
    await follower.stop()


async def test_following_without_a_start_gives_only_what_comes(connect_bus: Connect) -> None:
    bus, reader = await connect_bus(), await connect_bus()
    await append(bus, 1, 2)
    follower = Follower(reader, since=None)
    number = 3
    while not follower.seen:  # it begins when the iteration does, which nobody can see from outside
        await append(bus, number)
        number += 1
        await asyncio.sleep(0.01)
    first = follower.seen[0].sequence
    assert first > 2
    await append(bus, number)
    await eventually(lambda: follower.seen[-1].data == str(number).encode())
    assert [m.sequence for m in follower.seen] == list(range(first, number + 1))
    await follower.stop()


async def test_several_followers_each_see_everything(connect_bus: Connect) -> None:
    bus = await connect_bus()
    followers = [Follower(bus) for _ in range(3)]
    await append(bus, 1, 2, 3)
    await eventually(lambda: all(f.data == [b"1", b"2", b"3"] for f in followers))
    for follower in followers:
        await follower.stop()


async def test_leaving_a_follow_early_leaves_the_bus_usable(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await append(bus, 1, 2, 3)
    async for message in bus.follow(EVENTS_ALL, since_sequence=1):
        assert message.data == b"1"
        break
    assert len(await replay(bus)) == 3


async def test_events_are_also_plain_messages(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard: list[bytes] = []

    async def handler(message: Message) -> None:
        heard.append(message.data)

    await bus.subscribe(EVENTS_ALL, handler)
    await append(bus, 1)
    await eventually(lambda: heard == [b"1"])


async def test_only_event_subjects_are_kept(connect_bus: Connect) -> None:
    with pytest.raises(BusError):
        await (await connect_bus()).append("stoker.v1.elsewhere", b"", message_id="1")


async def test_an_event_over_the_limit_is_refused(connect_bus: Connect) -> None:
    bus = await connect_bus()
    with pytest.raises(MessageTooLarge):
        await bus.append(READY, b"x" * 1024 * 1024, message_id="1")
    assert await replay(bus) == []

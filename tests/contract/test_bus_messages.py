"""What every bus does with messages; run on the memory bus and on NATS."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import ClassVar

import pytest
from opentelemetry import trace
from tests.support.buses import Connect, eventually

from stoker_bus.port import Message, answer, ask, send
from stoker_contracts.codec import Contract, decode
from stoker_core.errors import Disconnected, MessageTooLarge, NoResponders, RequestTimeout
from stoker_core.tracing import setup_tracing, span

NEVER_S = 30.0


class Ping(Contract, frozen=True):
    number: int


class Pong(Contract, frozen=True, tag="pong"):
    number: int


class Small(Contract, frozen=True):
    LIMIT_BYTES: ClassVar[int] = 16
    text: str


class Collector:
    """A handler that keeps what it got."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def data(self) -> list[bytes]:
        return [m.data for m in self.messages]


async def test_a_message_reaches_every_subscriber_of_its_subject(connect_bus: Connect) -> None:
    sender, first, second = await connect_bus(), await connect_bus(), await connect_bus()
    one, two, other = Collector(), Collector(), Collector()
    await first.subscribe("stoker.v1.a", one)
    await second.subscribe("stoker.v1.a", two)
    await second.subscribe("stoker.v1.b", other)
    await sender.publish("stoker.v1.a", b"hello")
    await sender.publish("stoker.v1.b", b"end")
    await eventually(lambda: bool(one.data and two.data and other.data))
    assert (one.data, two.data, other.data) == ([b"hello"], [b"hello"], [b"end"])
    assert one.messages[0].subject == "stoker.v1.a"
    assert one.messages[0].reply == ""
    assert one.messages[0].headers == {}


async def test_a_sender_hears_itself(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    await bus.subscribe("x", heard)
    await bus.publish("x", b"1")
    await eventually(lambda: heard.data == [b"1"])


async def test_publishing_where_nobody_listens_is_no_error(connect_bus: Connect) -> None:
    await (await connect_bus()).publish("nobody.here", b"")


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("a.*.c", ["a.b.c", "a.x.c"], ["a.c", "a.b.b.c", "a.b.d"]),
        ("a.>", ["a.b", "a.b.c"], ["a", "b.a"]),
        ("*", ["a"], ["a.b"]),
        ("*.b", ["a.b"], ["b", "a.b.c"]),
        ("a.*", ["a.b"], ["a", "a.b.c"]),
        (">", ["a", "a.b.c"], []),
    ],
)
async def test_wildcards_match_as_nats_says(
    connect_bus: Connect, pattern: str, fits: list[str], fits_not: list[str]
) -> None:
    bus = await connect_bus()
    heard, everything = Collector(), Collector()
    prefix = "w."
    await bus.subscribe(prefix + pattern, heard)
    await bus.subscribe(prefix + ">", everything)
    for subject in fits + fits_not:
        await bus.publish(prefix + subject, b"")
    await eventually(lambda: len(everything.messages) == len(fits + fits_not))
    await eventually(lambda: len(heard.messages) >= len(fits))
    assert [m.subject for m in heard.messages] == [prefix + s for s in fits]


@pytest.mark.parametrize("subject", ["", "a..b", ".a", "a.", "a b", "a.*", "a.>", "a\r\nPUB b 0"])
async def test_a_malformed_subject_is_refused_and_the_connection_lives(connect_bus: Connect, subject: str) -> None:
    bus = await connect_bus()
    with pytest.raises(ValueError, match="no subject"):
        await bus.publish(subject, b"")
    with pytest.raises(ValueError, match="no subject"):
        await bus.request(subject, b"", timeout_s=1)
    with pytest.raises(NoResponders):
        await bus.request("still.alive", b"", timeout_s=NEVER_S)


@pytest.mark.parametrize("pattern", ["", "a..b", "a.>.b", "a.b*", "a b"])
async def test_a_malformed_pattern_is_refused(connect_bus: Connect, pattern: str) -> None:
    with pytest.raises(ValueError, match="no subject"):
        await (await connect_bus()).subscribe(pattern, Collector())


async def test_a_request_is_answered(connect_bus: Connect) -> None:
    client, server = await connect_bus(), await connect_bus()

    async def handler(message: Message) -> None:
        await answer(server, message, Pong(number=decode(Ping, message.data).number + 1))

    await server.subscribe("service", handler)
    replies: list[Pong] = await asyncio.gather(
        *(ask(client, "service", Ping(number=n), Pong, timeout_s=NEVER_S) for n in range(20))
    )
    assert [r.number for r in replies] == list(range(1, 21))


async def test_answering_a_message_that_wants_no_answer_sends_nothing(connect_bus: Connect) -> None:
    bus = await connect_bus()
    everything = Collector()
    await bus.subscribe(">", everything)
    await answer(bus, Message("a", b"", {}, ""), Pong(number=1))
    await bus.publish("end", b"")
    await eventually(lambda: bool(everything.messages))
    assert [m.subject for m in everything.messages] == ["end"]


async def test_a_request_that_nobody_hears_fails_long_before_its_timeout(connect_bus: Connect) -> None:
    bus = await connect_bus()
    started_s = time.monotonic()
    with pytest.raises(NoResponders) as caught:
        await bus.request("nobody", b"", timeout_s=NEVER_S)
    assert time.monotonic() - started_s < NEVER_S / 2
    assert caught.value.subject == "nobody"


async def test_a_request_without_an_answer_times_out(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    await bus.subscribe("silent", heard)
    with pytest.raises(RequestTimeout) as caught:
        await bus.request("silent", b"", timeout_s=0.05)
    assert caught.value.timeout_s == 0.05
    assert heard.messages[0].reply


async def test_an_answer_after_the_timeout_disturbs_nothing(connect_bus: Connect) -> None:
    client, server = await connect_bus(), await connect_bus()
    late = asyncio.Event()
    answered = asyncio.Event()

    async def handler(message: Message) -> None:
        if message.data == b"slow":
            await late.wait()
        await server.publish(message.reply, message.data)
        if message.data == b"slow":
            answered.set()

    await server.subscribe("service", handler, concurrency=2)
    with pytest.raises(RequestTimeout):
        await client.request("service", b"slow", timeout_s=0.05)
    late.set()
    await answered.wait()
    assert (await client.request("service", b"quick", timeout_s=NEVER_S)).data == b"quick"


async def test_cancelling_a_request_cancels_it_at_once(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    await bus.subscribe("silent", heard)
    task = asyncio.create_task(bus.request("silent", b"", timeout_s=NEVER_S))
    await eventually(lambda: bool(heard.messages))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_each_message_goes_to_one_member_of_a_queue_group(connect_bus: Connect) -> None:
    sender, first, second, outside = [await connect_bus() for _ in range(4)]
    one, two, other_group, alone = Collector(), Collector(), Collector(), Collector()
    await first.subscribe("work", one, queue="team")
    await second.subscribe("work", two, queue="team")
    await outside.subscribe("work", other_group, queue="audit")
    await outside.subscribe("work", alone)
    sent = [str(n).encode() for n in range(100)]
    for data in sent:
        await sender.publish("work", data)
    await eventually(lambda: len(one.data) + len(two.data) == 100 and len(alone.data) == len(other_group.data) == 100)
    assert sorted(one.data + two.data) == sorted(sent)
    assert one.data
    assert two.data
    assert alone.data == other_group.data == sent


async def test_a_queue_group_serves_a_request_once(connect_bus: Connect) -> None:
    client, server = await connect_bus(), await connect_bus()
    calls = Collector()

    async def handler(message: Message) -> None:
        await calls(message)
        await server.publish(message.reply, b"done")

    for _ in range(3):
        await server.subscribe("service", handler, queue="q")
    await client.request("service", b"", timeout_s=NEVER_S)
    await client.publish("service.end", b"")
    assert len(calls.messages) == 1


async def test_headers_arrive_as_sent(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    headers = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "X-Text": "naïve — ∑", "empty": ""}
    await bus.subscribe("h", heard)
    await bus.publish("h", b"data", headers=headers)
    await eventually(lambda: bool(heard.messages))
    assert dict(heard.messages[0].headers) == headers


@pytest.mark.parametrize("headers", [{"a b": "x"}, {"a": "x\r\ny: z"}, {"": "x"}, {"a:": "x"}, {"a": " padded "}])
async def test_headers_that_cannot_arrive_as_sent_are_refused(connect_bus: Connect, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        await (await connect_bus()).publish("h", b"", headers=headers)


async def test_the_trace_goes_on_in_the_handler(connect_bus: Connect) -> None:
    setup_tracing("test")
    client, server = await connect_bus(), await connect_bus()
    seen: list[int] = []

    async def handler(message: Message) -> None:
        with span("handle", headers=message.headers):
            seen.append(trace.get_current_span().get_span_context().trace_id)
        await answer(server, message, Pong(number=1))

    await server.subscribe("traced", handler)
    with span("request") as current:
        await ask(client, "traced", Ping(number=1), Pong, timeout_s=NEVER_S)
        await send(client, "traced", Ping(number=2))
    await eventually(lambda: len(seen) == 2)
    assert set(seen) == {current.get_span_context().trace_id}


async def test_one_handler_at_a_time_keeps_the_order(connect_bus: Connect) -> None:
    bus, sender = await connect_bus(), await connect_bus()
    done: list[bytes] = []

    async def handler(message: Message) -> None:
        if len(done) % 2 == 0:
            await asyncio.sleep(0)
        done.append(message.data)

    await bus.subscribe("ordered", handler)
    sent = [str(n).encode() for n in range(500)]
    for data in sent:
        await sender.publish("ordered", data)
    await eventually(lambda: len(done) == 500)
    assert done == sent


async def test_as_many_handlers_run_at_once_as_asked_for_and_no_more(connect_bus: Connect) -> None:
    bus = await connect_bus()
    running = 0
    most = 0
    gate = asyncio.Event()
    finished: list[bytes] = []

    async def handler(message: Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        finished.append(message.data)

    await bus.subscribe("many", handler, concurrency=3)
    for n in range(10):
        await bus.publish("many", str(n).encode())
    await eventually(lambda: running == 3)
    gate.set()
    await eventually(lambda: len(finished) == 10)
    assert most == 3


async def test_beyond_pending_max_the_newest_are_dropped_and_counted(connect_bus: Connect) -> None:
    bus = await connect_bus()
    gate = asyncio.Event()
    handled: list[bytes] = []

    async def handler(message: Message) -> None:
        handled.append(message.data)
        await gate.wait()

    everything = Collector()
    slow = await bus.subscribe("flood.a", handler, pending_max=5)
    await bus.subscribe("flood.>", everything)
    await bus.publish("flood.a", b"first")
    await eventually(lambda: handled == [b"first"])
    for n in range(20):
        await bus.publish("flood.a", str(n).encode())
    await eventually(lambda: len(everything.messages) == 21 and slow.dropped == 15)  # type: ignore[attr-defined]
    gate.set()
    await eventually(lambda: len(handled) == 6)
    await bus.publish("flood.a", b"afterwards")
    await eventually(lambda: handled[-1] == b"afterwards")
    assert handled == [b"first", b"0", b"1", b"2", b"3", b"4", b"afterwards"]


@pytest.mark.parametrize("failure", [RuntimeError("broken"), asyncio.CancelledError()])
async def test_a_handler_that_fails_loses_one_message_only(connect_bus: Connect, failure: BaseException) -> None:
    bus = await connect_bus()
    handled: list[bytes] = []

    async def handler(message: Message) -> None:
        if message.data == b"bad":
            raise failure
        handled.append(message.data)

    await bus.subscribe("fragile", handler)
    for data in (b"1", b"bad", b"2", b"bad", b"3"):
        await bus.publish("fragile", data)
    await eventually(lambda: handled == [b"1", b"2", b"3"])


async def test_nothing_is_handled_after_stop_but_running_handlers_finish(connect_bus: Connect) -> None:
    bus = await connect_bus()
    gate = asyncio.Event()
    started: list[bytes] = []
    finished: list[bytes] = []

    async def handler(message: Message) -> None:
        started.append(message.data)
        await gate.wait()
        finished.append(message.data)

    fence = Collector()
    subscription = await bus.subscribe("s", handler)
    await bus.subscribe("fence", fence)
    await bus.publish("s", b"running")
    await bus.publish("s", b"waiting")
    await eventually(lambda: started == [b"running"])
    await subscription.stop()
    await subscription.stop()
    await bus.publish("s", b"late")
    await bus.publish("fence", b"")
    await eventually(lambda: bool(fence.messages))
    gate.set()
    await eventually(lambda: finished == [b"running"])
    assert started == [b"running"]
    with pytest.raises(NoResponders):
        await bus.request("s", b"", timeout_s=NEVER_S)


async def test_a_payload_over_the_limit_is_refused_and_the_connection_lives(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    await bus.subscribe("big", heard)
    await bus.publish("big", b"x" * 768 * 1024)
    for headers in ({}, {"h": "x" * 1000}):
        with pytest.raises(MessageTooLarge) as caught:
            await bus.publish("big", b"x" * (1024 * 1024 - 500 + (501 if not headers else 0)), headers=headers)
        assert caught.value.subject == "big"
        assert caught.value.size_bytes > caught.value.limit_bytes == 1024 * 1024
    with pytest.raises(MessageTooLarge):
        await bus.request("big", b"x" * (1024 * 1024 + 1), timeout_s=NEVER_S)
    with pytest.raises(MessageTooLarge):
        await send(bus, "big", Small(text="x" * 100))
    await bus.publish("big", b"end")
    await eventually(lambda: [len(d) for d in heard.data] == [768 * 1024, 3])
    assert bus.reconnects == 0


async def test_a_payload_of_just_the_limit_arrives(connect_bus: Connect) -> None:
    bus = await connect_bus()
    heard = Collector()
    headers = {"name": "välue"}
    headers_bytes = len("NATS/1.0\r\n" + "name: välue\r\n" + "\r\n") + 1  # ä takes two
    await bus.subscribe("exact", heard)
    await bus.publish("exact", b"x" * (1024 * 1024 - headers_bytes), headers=headers)
    with pytest.raises(MessageTooLarge):
        await bus.publish("exact", b"x" * (1024 * 1024 - headers_bytes + 1), headers=headers)
    await eventually(lambda: len(heard.messages) == 1)


async def test_close_finishes_what_handlers_were_doing_and_sends_their_answers(connect_bus: Connect) -> None:
    client, server = await connect_bus(), await connect_bus()
    gate = asyncio.Event()
    begun = asyncio.Event()

    async def handler(message: Message) -> None:
        begun.set()
        await gate.wait()
        await server.publish(message.reply, b"answer")

    await server.subscribe("service", handler)
    request = asyncio.create_task(client.request("service", b"", timeout_s=NEVER_S))
    await begun.wait()
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    gate.set()
    assert (await request).data == b"answer"
    await closing
    assert not server.connected


async def test_a_closed_bus_refuses_every_call(connect_bus: Connect) -> None:
    bus = await connect_bus()
    await bus.close()
    await bus.close()
    assert not bus.connected
    for call in (
        bus.publish("a", b""),
        bus.request("a", b"", timeout_s=1),
        bus.subscribe("a", Collector()),
        bus.append("stoker.v1.events.a", b"", message_id="1"),
        anext(aiter(bus.follow("stoker.v1.events.>"))),
    ):
        with pytest.raises(Disconnected):
            await call


async def test_closing_one_connection_leaves_the_others_alone(connect_bus: Connect) -> None:
    leaving, staying = await connect_bus(), await connect_bus()
    heard = Collector()
    await leaving.subscribe("a", Collector())
    await staying.subscribe("a", heard)
    await leaving.close()
    await staying.publish("a", b"1")
    await eventually(lambda: heard.data == [b"1"])


async def test_a_handler_may_close_its_bus(connect_bus: Connect) -> None:
    bus, other = await connect_bus(), await connect_bus()
    closed = asyncio.Event()

    async def handler(_: Message) -> None:
        await bus.close()
        closed.set()

    await bus.subscribe("bye", handler)
    await other.publish("bye", b"")
    await asyncio.wait_for(closed.wait(), NEVER_S)
    with contextlib.suppress(Disconnected):
        await bus.close()
    assert not bus.connected

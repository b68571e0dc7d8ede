"""Events: what a publisher puts in the stream; run on the memory bus and on NATS."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent as SdkEvent
from tests.support.buses import Connect, Faulty, eventually

from stoker_bus.events import PENDING_MAX, EventPublisher
from stoker_bus.port import Bus
from stoker_contracts.codec import decode
from stoker_contracts.events import INSTANCE_READY, MODEL_REGISTERED, NODE_JOINED, CloudEvent
from stoker_contracts.subjects import EVENTS_ALL
from stoker_core.clock import SystemClock
from stoker_core.ids import SequentialIds
from stoker_core.runner import run_parts
from stoker_core.tracing import setup_tracing, span

DRAIN_S = 20.0


def publisher(bus: Bus) -> EventPublisher:
    return EventPublisher(
        bus, service="worker", name="node-1", boot_id="boot-1", clock=SystemClock(), ids=SequentialIds()
    )


async def stored(bus: Bus) -> list[tuple[str, CloudEvent]]:
    return [
        (m.subject, decode(CloudEvent, m.data)) async for m in bus.follow(EVENTS_ALL, since_sequence=1, follow=False)
    ]


async def run_and_stop(events: EventPublisher) -> None:
    stop = asyncio.Event()
    stop.set()
    await run_parts([events.part()], stop, drain_s=DRAIN_S)


async def test_cloudevents_own_library_reads_an_event_with_and_without_a_trace(connect_bus: Connect) -> None:
    setup_tracing("test")
    bus = await connect_bus()
    events = publisher(bus)
    events.emit(INSTANCE_READY, "inst-1", model="m")
    with span("work"):
        events.emit(NODE_JOINED, "node-1", devices=["cpu"])
    await run_and_stop(events)
    raw = [m.data async for m in bus.follow(EVENTS_ALL, since_sequence=1, follow=False)]
    read = [JSONFormat().read(SdkEvent, data) for data in raw]  # validates attribute names, types and values
    assert [(e.get_type(), e.get_subject(), e.get_data()) for e in read] == [
        ("stoker.instance.ready", "inst-1", {"model": "m"}),
        ("stoker.node.joined", "node-1", {"devices": ["cpu"]}),
    ]
    assert [e.get_extension("sequence") for e in read] == ["000000000001", "000000000002"]
    assert "traceparent" not in read[0].get_attributes()
    assert read[1].get_extension("traceparent").startswith("00-")
    assert read[0].get_time().tzinfo is not None


async def test_an_event_is_a_whole_cloudevent(connect_bus: Connect) -> None:
    setup_tracing("test")
    bus = await connect_bus()
    events = publisher(bus)
    with span("work") as current:
        events.emit(INSTANCE_READY, "inst-1", model="m", start_ms=1234.5, devices=[0])
    await run_and_stop(events)
    [(subject, event)] = await stored(bus)
    assert subject == "stoker.v1.events.instance.ready"
    assert event.specversion == "1.0"
    assert event.id == "event-1"
    assert event.source == "/stoker/worker/node-1"
    assert event.type == "stoker.instance.ready"
    assert event.subject == "inst-1"
    assert event.bootid == "boot-1"
    assert event.sequence == "000000000001"
    assert event.datacontenttype == "application/json"
    assert event.data == {"model": "m", "start_ms": 1234.5, "devices": [0]}
    assert event.traceparent.split("-")[1] == f"{current.get_span_context().trace_id:032x}"
    assert event.time.endswith("Z")
    assert datetime.fromisoformat(event.time).utcoffset() == timedelta(0)


async def test_events_keep_their_order_and_count_up(connect_bus: Connect) -> None:
    bus = await connect_bus()
    events = publisher(bus)
    for n in range(50):
        events.emit(NODE_JOINED if n % 2 else MODEL_REGISTERED, f"s{n}", n=n)
    await run_and_stop(events)
    found = [event for _, event in await stored(bus)]
    assert [event.data["n"] for event in found] == list(range(50))
    assert [event.sequence for event in found] == [f"{n:012d}" for n in range(1, 51)]
    assert found[0].traceparent == ""


async def test_events_are_published_while_the_service_runs(connect_bus: Connect) -> None:
    bus = await connect_bus()
    events = publisher(bus)
    stop = asyncio.Event()
    running = asyncio.create_task(run_parts([events.part()], stop, drain_s=DRAIN_S))
    for n in range(1, 4):
        events.emit(NODE_JOINED, "n", n=n)
        async with asyncio.timeout(DRAIN_S):
            while len(await stored(bus)) < n:
                await asyncio.sleep(0.005)
    stop.set()
    await running


async def test_beyond_the_bound_the_oldest_are_dropped_and_the_gap_shows(connect_bus: Connect) -> None:
    bus = await connect_bus()
    events = publisher(bus)
    for n in range(PENDING_MAX + 3):
        events.emit(NODE_JOINED, "n", n=n)
    assert events.dropped == 3
    await run_and_stop(events)
    found = [event for _, event in await stored(bus)]
    assert len(found) == PENDING_MAX
    assert (found[0].sequence, found[-1].sequence) == ("000000000004", f"{PENDING_MAX + 3:012d}")


async def test_an_event_too_large_is_dropped_and_the_next_goes_through(connect_bus: Connect) -> None:
    bus = await connect_bus()
    events = publisher(bus)
    events.emit(NODE_JOINED, "n", text="x" * CloudEvent.LIMIT_BYTES)
    events.emit(NODE_JOINED, "n", text="small")
    assert events.dropped == 1
    await run_and_stop(events)
    assert [event.sequence for _, event in await stored(bus)] == ["000000000002"]


async def test_events_of_an_outage_come_after_it_once(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    events = publisher(bus)
    stop = asyncio.Event()
    running = asyncio.create_task(run_parts([events.part()], stop, drain_s=DRAIN_S))
    events.emit(NODE_JOINED, "n", n=1)
    async with asyncio.timeout(DRAIN_S):
        while len(await stored(bus)) < 1:
            await asyncio.sleep(0.005)
    await faulty_bus.cut()
    await eventually(lambda: not bus.connected)
    for n in (2, 3, 4):
        events.emit(NODE_JOINED, "n", n=n)
    await asyncio.sleep(0.05)
    await faulty_bus.mend()
    await eventually(lambda: bus.connected)
    async with asyncio.timeout(DRAIN_S):
        while len(await stored(bus)) < 4:
            await asyncio.sleep(0.005)
    stop.set()
    await running
    assert [event.data["n"] for _, event in await stored(bus)] == [1, 2, 3, 4]
    assert events.dropped == 0


async def test_a_stop_without_a_bus_does_not_wait_for_one(faulty_bus: Faulty) -> None:
    bus = await faulty_bus.connect()
    events = publisher(bus)
    await faulty_bus.cut()
    await eventually(lambda: not bus.connected)
    for _ in range(5):
        events.emit(NODE_JOINED, "n")
    started_s = time.monotonic()
    await run_and_stop(events)
    assert time.monotonic() - started_s < DRAIN_S / 2
    assert events.dropped == 5

"""From the queue to an instance, on the memory bus and a manual clock where instances answer late or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.support.fake_instance import model_spec

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import Message, answer, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode, pack_tokens
from stoker_contracts.control import InstanceStatus, WorkerStatus
from stoker_contracts.inference import Accepted, Cancel, Finish, Frame, Frames, Generate, Sampling
from stoker_contracts.models import InstanceState
from stoker_core.clock import ManualClock
from stoker_core.errors import NoCapacity
from stoker_gateway.link import Link
from stoker_gateway.placing import Job, Placing
from stoker_gateway.queues import Dispatcher, Queues
from stoker_gateway.routes import Routes
from stoker_gateway.streams import Streams

TURNS_MAX = 2000


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(TURNS_MAX):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("not within the turns given")


class World:
    """A gateway's placing, and one scripted instance: `reply` decides what it answers, if anything."""

    def __init__(self, *, wait_s: float = 60.0, generate_timeout_s: float = 0.01) -> None:
        broker = MemoryBroker()
        self.bus, self._other = broker.connect(), broker.connect()
        self.spec = model_spec(slots=1, wait_s=wait_s)
        self.routes = Routes()
        self.dispatcher = Dispatcher(Queues(), self.routes)
        self.streams = Streams(self.bus, "g", self.dispatcher, ManualClock())
        self.placing = Placing(
            self.bus,
            "g",
            self.dispatcher,
            self.streams,
            ManualClock(),
            cache_salt="",
            generate_timeout_s=generate_timeout_s,
            stream_buffer_tokens_max=100,
            on_cold=lambda _: None,
        )
        self.generates: list[Generate] = []
        self.cancels: list[Cancel] = []
        self.reply: Callable[[Generate], Accepted | None] = lambda _: Accepted(room=0)
        self._seq = 0

    async def start(self) -> None:
        await self.bus.subscribe(subjects.gateway_frames("g"), self.streams.on_frames)
        await self._other.subscribe(subjects.instance_generate("n", "i"), self._on_generate)
        await self._other.subscribe(subjects.instance_cancel("n", "i"), self._on_cancel)
        self.room(1)

    def room(self, room: int) -> None:
        self._seq += 1
        status = InstanceStatus(
            instance_id="i",
            model_id=self.spec.model_id,
            model="tiny",
            state=InstanceState.READY,
            devices=(0,),
            room=room,
        )
        self.routes.on_status(
            WorkerStatus(node="n", boot_id="b", seq=self._seq, term=1, devices=(), instances=(status,)), 0
        )
        self.dispatcher.wake(self.spec.model_id)

    async def frame(self, attempt: int, index: int, *tokens: int, finish: Finish | None = None) -> None:
        frame = Frame(request_id="r", attempt=attempt, index=index, tokens=pack_tokens(tokens), finish=finish)
        message = Frames(node="n", instance_id="i", frames=(frame,), room=0)
        await send(self._other, subjects.gateway_frames("g"), message)

    def job(self, request_id: str = "r") -> Job:
        return Job(request_id, self.spec, [1, 2], Sampling(max_tokens=10))

    async def _on_generate(self, message: Message) -> None:
        generate = decode(Generate, message.data)
        self.generates.append(generate)
        if (reply := self.reply(generate)) is not None:
            await answer(self._other, message, reply)

    async def _on_cancel(self, message: Message) -> None:
        self.cancels.append(decode(Cancel, message.data))


async def test_what_an_unanswered_attempt_still_sends_is_cancelled_and_leaves_the_next_one_alone() -> None:
    world = World()
    await world.start()
    world.reply = lambda generate: Accepted(room=0) if generate.attempt == 2 else None
    placed = asyncio.create_task(world.placing.place(world.job()))
    async with asyncio.timeout(5):
        while not world.cancels:
            await asyncio.sleep(0.001)
    await world.frame(1, 0, 7, finish=Finish.STOP)  # it had admitted the request after all
    await until(lambda: len(world.cancels) == 2)
    assert {(c.request_id, c.attempt) for c in world.cancels} == {("r", 1)}
    world.room(1)
    stream = await placed
    assert [g.attempt for g in world.generates] == [1, 2]
    assert world.generates[1].generated == b""
    await world.frame(2, 0, 8, finish=Finish.STOP)
    await until(lambda: stream.session.ended)
    assert list(stream.session.journal) == [8]
    await world.streams.close(stream)


async def test_a_client_that_leaves_while_its_request_is_offered_lets_the_next_one_in() -> None:
    world = World(generate_timeout_s=60)
    await world.start()
    world.reply = lambda generate: None if generate.request_id == "r" else Accepted(room=0)
    first = asyncio.create_task(world.placing.place(world.job()))
    await until(lambda: len(world.generates) == 1)
    second = asyncio.create_task(world.placing.place(world.job("r2")))
    await until(lambda: world.dispatcher.queues.depth(world.spec.model_id) == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await until(second.done)
    assert [(c.request_id, c.attempt) for c in world.cancels] == [("r", 1)]
    await world.streams.close(await second)


async def test_a_wait_that_ends_while_a_request_is_offered_cancels_it_there() -> None:
    world = World(wait_s=0.02, generate_timeout_s=60)
    await world.start()
    world.reply = lambda _: None
    with pytest.raises(NoCapacity):
        await world.placing.place(world.job())
    await until(lambda: [(c.request_id, c.attempt) for c in world.cancels] == [("r", 1)])
    assert len(world.streams) == 0
    assert world.dispatcher.queues.models() == []
    assert world.routes.reserve(world.spec.model_id, slots=1) is not None, "its place there is free again"


async def test_a_reply_that_is_lost_while_frames_come_counts_as_admitted() -> None:
    world = World(generate_timeout_s=0.05)
    await world.start()
    world.reply = lambda _: None
    placed = asyncio.create_task(world.placing.place(world.job()))
    await until(lambda: len(world.generates) == 1)
    await world.frame(1, 0, 7)
    stream = await placed
    assert list(stream.session.journal) == [7]
    assert world.cancels == []
    await world.streams.close(stream)
    await until(lambda: len(world.cancels) == 1)


def test_a_pause_of_the_observer_itself_is_no_silence_of_others() -> None:
    clock = ManualClock()
    link = Link(MemoryBroker().connect(), clock)
    for _ in range(20):
        clock.advance(0.25)
        assert link.up_since_s() == 0.0
    clock.advance(4.0)  # frozen, or starved of its processor
    assert link.up_since_s() == clock.monotonic_s()

"""A node with instances that speak the contracts on any bus, and answer by script instead of by model.

async with FakeNode(bus) as node:
    instance = await node.add("inst-1", spec, tokens=tokenizer.encode("Paris").ids)
    instance.delay_s = 0.05      # per token
    instance.mute()              # dies silently: no frame, no answer, no status any more
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from stoker_bus.port import Bus, Message, Subscription, answer, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode, pack_tokens
from stoker_contracts.control import STATUS_INTERVAL_S, InstanceStatus, WorkerStatus
from stoker_contracts.inference import (
    KEEPALIVE_S,
    RESEND_AFTER_S,
    Accepted,
    Ack,
    Cancel,
    Finish,
    Frame,
    Frames,
    Generate,
    Refused,
    RefusedReason,
)
from stoker_contracts.models import Device, DeviceKind, InstanceState, ModelSpec
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import Disconnected

TICK_S = 0.05
VOCAB_SIZE = 512


def model_spec(name: str = "tiny", **fields: object) -> ModelSpec:
    values: dict[str, object] = {
        "model_id": f"m-{name}",
        "name": name,
        "source": "file:///models/tiny",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "weight_bytes": 1000,
        "max_model_len": 256,
        "vocab_size": VOCAB_SIZE,
        "kv_bytes_per_token": 64,
        "kv_cache_bytes": 1 << 20,
        "slots": 4,
        "wait_s": 10.0,
    }
    return ModelSpec(**(values | fields))  # type: ignore[arg-type]


@dataclass
class _Running:
    message: Generate
    tokens: list[int] = field(default_factory=list)
    base: int = 0  # of the tokens, how many are acked
    finish: Finish | None = None
    sent_s: float = 0.0
    task: asyncio.Task[None] | None = None


class FakeInstance:
    """Admits `slots` requests; each is answered with `tokens`, then `finish`."""

    def __init__(self, node: FakeNode, instance_id: str, spec: ModelSpec, tokens: Sequence[int]) -> None:
        self.instance_id = instance_id
        self.spec = spec
        self.tokens = list(tokens)
        self.finish = Finish.STOP
        self.error = ""
        self.delay_s = 0.0
        self.refuse: RefusedReason | None = None
        self.state = InstanceState.READY
        self.failure = ""
        self.drop_every = 0  # of the frames, every so manieth is lost on its way
        self.generates: list[Generate] = []
        self.cancels: list[Cancel] = []
        self.acks: list[Ack] = []
        self._node = node
        self._running: dict[tuple[str, int], _Running] = {}
        self._muted = False
        self._sent = 0
        self._steps = 0
        self._subscriptions: list[Subscription] = []

    @property
    def running(self) -> int:
        return sum(one.finish is None for one in self._running.values())

    @property
    def unacked(self) -> int:
        """Requests of which anything is not acked yet."""
        return len(self._running)

    @property
    def room(self) -> int:
        return max(0, self.spec.slots - self.running) if self.state is InstanceState.READY else 0

    @property
    def muted(self) -> bool:
        return self._muted

    def status(self) -> InstanceStatus:
        return InstanceStatus(
            instance_id=self.instance_id,
            model_id=self.spec.model_id,
            model=self.spec.name,
            state=self.state,
            devices=(0,),
            room=self.room,
            running=self.running,
            failure=self.failure,
            engine="fake",
        )

    def mute(self) -> None:
        """Fall silent at once, as a frozen or cut off process does. It stays in its worker's status."""
        self._muted = True

    async def die(self, failure: str = "killed") -> None:
        """End as a crashed process does: its worker notices and says so."""
        self.mute()
        await self._unsubscribe()
        self.state, self.failure = InstanceState.FAILED, failure
        await self._node.report()

    async def disappear(self) -> None:
        """Listen no more, unnoticed by its worker."""
        self.mute()
        await self._unsubscribe()

    async def become(self, state: InstanceState) -> None:
        self.state = state
        await self._node.report()

    async def start(self) -> None:
        bus, node = self._node.bus, self._node.name
        for subject, handler in (
            (subjects.instance_generate(node, self.instance_id), self._on_generate),
            (subjects.instance_ack(node, self.instance_id), self._on_ack),
            (subjects.instance_cancel(node, self.instance_id), self._on_cancel),
        ):
            self._subscriptions.append(await bus.subscribe(subject, handler))

    async def _unsubscribe(self) -> None:
        for subscription in self._subscriptions:
            await subscription.stop()
        self._subscriptions.clear()

    async def _on_generate(self, message: Message) -> None:
        if self._muted:
            return
        request: Generate = decode(Generate, message.data)
        key = (request.request_id, request.attempt)
        if key not in self._running:
            if self.refuse is not None:
                await answer(self._node.bus, message, Refused(reason=self.refuse, retry_after_ms=100))
                return
            if self.room == 0:
                await answer(self._node.bus, message, Refused(reason=RefusedReason.BUSY, retry_after_ms=100))
                return
            self.generates.append(request)
            self._running[key] = running = _Running(request)
            running.task = self._node.spawn(self._produce(running))
        await answer(self._node.bus, message, Accepted(room=self.room))

    async def _on_ack(self, message: Message) -> None:
        ack: Ack = decode(Ack, message.data)
        self.acks.append(ack)
        for wanted in ack.wanted:
            running = self._running.get((wanted.request_id, wanted.attempt))
            if running is not None:
                running.base = max(running.base, min(wanted.next, len(running.tokens)))
                if running.finish is not None and wanted.next > len(running.tokens):
                    del self._running[wanted.request_id, wanted.attempt]

    async def _on_cancel(self, message: Message) -> None:
        cancel: Cancel = decode(Cancel, message.data)
        self.cancels.append(cancel)
        running = self._running.pop((cancel.request_id, cancel.attempt), None)
        if running is not None:
            if running.task is not None:
                running.task.cancel()
            await self._node.report()

    async def _produce(self, running: _Running) -> None:
        """One token a frame, as an engine step makes them."""
        tokens = self.tokens[: running.message.sampling.max_tokens]
        finish = self.finish if len(tokens) == len(self.tokens) else Finish.LENGTH
        for i, token in enumerate(tokens):
            if self.delay_s:
                await self._node.clock.sleep(self.delay_s)
            running.tokens.append(token)
            if i == len(tokens) - 1:
                running.finish = finish
            self._steps += 1
            await self._send(running, start=i)
        if not tokens:
            running.finish = finish
            await self._send(running, start=0)
        await self._node.report()

    async def _send(self, running: _Running, start: int) -> None:
        running.sent_s = self._node.clock.monotonic_s()
        frame = Frame(
            request_id=running.message.request_id,
            attempt=running.message.attempt,
            index=start,
            tokens=pack_tokens(running.tokens[start:]),
            finish=running.finish,
            error=self.error if running.finish is Finish.ERROR else "",
        )
        await self._publish(running.message.gateway_id, (frame,))

    async def _publish(self, gateway_id: str, frames: tuple[Frame, ...]) -> None:
        self._sent += bool(frames)
        if self._muted or (frames and self.drop_every and self._sent % self.drop_every == 0):
            return
        message = Frames(
            node=self._node.name, instance_id=self.instance_id, frames=frames, room=self.room, steps=self._steps
        )
        with contextlib.suppress(Disconnected):  # kept, and sent again until acked
            await send(self._node.bus, subjects.gateway_frames(gateway_id), message)

    async def tick(self, *, keepalive: bool) -> None:
        """Send again what was not acked in time; keepalives where a request is in hand."""
        now_s = self._node.clock.monotonic_s()
        for running in list(self._running.values()):
            unacked = len(running.tokens) > running.base or running.finish is not None
            if unacked and now_s - running.sent_s >= RESEND_AFTER_S:
                await self._send(running, start=running.base)
        if keepalive:
            for gateway_id in {one.message.gateway_id for one in self._running.values()}:
                await self._publish(gateway_id, ())


class FakeNode:
    """Reports its instances every second and at once on a change. Use as `async with`."""

    def __init__(self, bus: Bus, name: str = "node-a", *, boot_id: str = "boot-1", clock: Clock | None = None) -> None:
        self.bus = bus
        self.name = name
        self.boot_id = boot_id
        self.clock: Clock = clock or SystemClock()
        self.instances: dict[str, FakeInstance] = {}
        self.silent = False  # reports nothing
        self.draining = False
        self._seq = 0
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self.spawn(self._loop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.silent = True
        for instance in self.instances.values():
            instance.mute()
            await instance._unsubscribe()
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.append(task)
        return task

    async def add(
        self,
        instance_id: str,
        spec: ModelSpec,
        tokens: Sequence[int] = (),
        *,
        state: InstanceState = InstanceState.READY,
    ) -> FakeInstance:
        instance = FakeInstance(self, instance_id, spec, tokens)
        instance.state = state
        await instance.start()
        self.instances[instance_id] = instance
        await self.report()
        return instance

    async def report(self) -> None:
        if self.silent:
            return
        self._seq += 1
        status = WorkerStatus(
            node=self.name,
            boot_id=self.boot_id,
            seq=self._seq,
            term=1,
            devices=(Device(index=0, kind=DeviceKind.CPU, name="slot 0", memory_bytes=1 << 30),),
            instances=tuple(instance.status() for instance in self.instances.values()),
            zygote_ready=True,
            draining=self.draining,
        )
        with contextlib.suppress(Disconnected):  # a real one repeats itself too
            await send(self.bus, subjects.status_worker(self.name), status)

    async def _loop(self) -> None:
        ticks = 0
        while True:
            if ticks % round(STATUS_INTERVAL_S / TICK_S) == 0:
                await self.report()
            for instance in list(self.instances.values()):
                await instance.tick(keepalive=ticks % round(KEEPALIVE_S / TICK_S) == 0)
            ticks += 1
            await self.clock.sleep(TICK_S)

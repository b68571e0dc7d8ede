"""A worker that speaks the contracts on any bus and runs nothing.

    async with FakeWorker(bus, "n1", clock=clock) as worker:
        worker.refuse_start = Failed(code="device_busy", message="full", retryable=True)

What it is told is kept in `starts`, `stops`, `prepares` and `drains`; how it behaves is set by its attributes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from stoker_bus.port import Bus, Message, Subscription, answer, send
from stoker_contracts import subjects
from stoker_contracts.codec import Contract, decode
from stoker_contracts.control import (
    STATUS_INTERVAL_S,
    AnnounceTerm,
    Done,
    DrainNode,
    Failed,
    InstanceStatus,
    PrepareModel,
    StartInstance,
    StopInstance,
    WorkerStatus,
)
from stoker_contracts.models import LIVE_STATES, Device, DeviceKind, InstanceState, ModelSpec, StartPhases
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import Disconnected, StaleTerm

GIB = 1 << 30


def model_spec(model_id: str, **fields: object) -> ModelSpec:
    """A model of 1 GiB whose instance needs 1.65 GiB, for tests."""
    values: dict[str, object] = {
        "model_id": model_id,
        "name": model_id,
        "source": f"file:///models/{model_id}",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "weight_bytes": GIB,
        "max_model_len": 2048,
        "vocab_size": 49152,
        "kv_bytes_per_token": 23040,
        "kv_cache_bytes": GIB // 2,
        "slots": 8,
    }
    return ModelSpec(**(values | fields))  # type: ignore[arg-type]


def cpu_slots(count: int, memory_bytes: int = 4 * GIB) -> tuple[Device, ...]:
    return tuple(
        Device(index=i, kind=DeviceKind.CPU, name=f"slot {i}", memory_bytes=memory_bytes) for i in range(count)
    )


@dataclass
class FakeInstance:
    command: StartInstance
    state: InstanceState
    since_s: float
    running: int = 0
    failure: str = ""
    phases: StartPhases = field(default_factory=StartPhases)
    ordered_s: float | None = None  # when its start command came


class FakeWorker:
    """One node. Statuses go out every second and on every change, unless `silent`."""

    def __init__(
        self,
        bus: Bus,
        node: str,
        *,
        devices: tuple[Device, ...] | None = None,
        boot_id: str = "boot-1",
        start_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self.bus, self.node, self.boot_id, self.start_s = bus, node, boot_id, start_s
        self.devices = cpu_slots(1) if devices is None else devices
        self.clock = clock or SystemClock()
        self.instances: dict[str, FakeInstance] = {}
        self.term = 0  # persisted: survives a reboot
        self.seq = 0
        self.silent = False
        self.deaf = False  # hears commands and answers none
        self.zygote_ready = True
        self.draining = False
        self.leaving = False
        self.prepared: tuple[str, ...] = ("LlamaForCausalLM",)
        self.refuse_start: Failed | None = None
        self.start_failure = ""  # not empty: instances fail instead of becoming ready
        self.starts: list[StartInstance] = []
        self.stops: list[StopInstance] = []
        self.prepares: list[PrepareModel] = []
        self.drains: list[DrainNode] = []
        self._subscriptions: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for subject, handler in (
            (subjects.worker_start(self.node), self._on_start),
            (subjects.worker_stop(self.node), self._on_stop),
            (subjects.worker_prepare(self.node), self._on_prepare),
            (subjects.worker_drain(self.node), self._on_drain),
            (subjects.worker_term(self.node), self._on_term),
        ):
            self._subscriptions.append(await self.bus.subscribe(subject, handler))
        self._tasks.append(asyncio.create_task(self._tick()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for subscription in self._subscriptions:
            await subscription.stop()
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    def live(self, model_id: str = "") -> list[str]:
        """Ids of live instances, of one model or of all."""
        return [
            instance_id
            for instance_id, i in self.instances.items()
            if i.state in LIVE_STATES and model_id in ("", i.command.model.model_id)
        ]

    def status(self) -> WorkerStatus:
        self.seq += 1
        return WorkerStatus(
            node=self.node,
            boot_id=self.boot_id,
            seq=self.seq,
            term=self.term,
            devices=self.devices,
            instances=tuple(self._listed(i) for i in self.instances.values()),
            prepared=self.prepared,
            zygote_ready=self.zygote_ready,
            draining=self.draining or self.leaving,
            leaving=self.leaving,
        )

    async def publish(self) -> None:
        if not self.silent and self.bus.connected:
            await send(self.bus, subjects.status_worker(self.node), self.status())

    async def run_instance(self, model: ModelSpec, instance_id: str, device: int = 0) -> None:
        """A ready instance that nobody ordered, as an earlier leader may have left it."""
        command = StartInstance(
            instance_id=instance_id, boot_id=self.boot_id, term=self.term, model=model, devices=(device,), budget_ms=0
        )
        self.instances[instance_id] = FakeInstance(command, InstanceState.READY, self.clock.monotonic_s())
        await self.publish()

    async def set_state(self, instance_id: str, state: InstanceState, *, failure: str = "") -> None:
        instance = self.instances[instance_id]
        instance.state, instance.since_s, instance.failure = state, self.clock.monotonic_s(), failure
        await self.publish()

    async def set_running(self, instance_id: str, running: int) -> None:
        """Requests in hand; from 0 on the instance idles."""
        instance = self.instances[instance_id]
        instance.running, instance.since_s = running, self.clock.monotonic_s()
        await self.publish()

    async def lose(self, instance_id: str) -> None:
        """The instance vanishes without a word."""
        del self.instances[instance_id]
        await self.publish()

    async def reboot(self, boot_id: str) -> None:
        """kill -9 and a new start: no instance survives, the persisted term does."""
        self.boot_id, self.seq, self.instances, self.draining = boot_id, 0, {}, False
        await self.publish()

    def _listed(self, instance: FakeInstance) -> InstanceStatus:
        now_s, command = self.clock.monotonic_s(), instance.command
        since_ms = round((now_s - instance.since_s) * 1000)
        ready = instance.state is InstanceState.READY
        return InstanceStatus(
            instance_id=command.instance_id,
            model_id=command.model.model_id,
            model=command.model.name,
            state=instance.state,
            devices=command.devices,
            room=command.model.slots - instance.running if ready else 0,
            running=instance.running,
            idle_ms=since_ms if ready and not instance.running else 0,
            age_ms=0 if instance.ordered_s is None else round((now_s - instance.ordered_s) * 1000),
            failure=instance.failure,
            phases=instance.phases,
        )

    async def _tick(self) -> None:
        while True:
            with suppress(Disconnected):  # said again in a second
                await self.publish()
            await self.clock.sleep(STATUS_INTERVAL_S)

    def _refusal(self, term: int, boot_id: str | None) -> Failed | None:
        if term < self.term:
            return Failed(code=StaleTerm.code, message=f"the highest term seen is {self.term}")
        self.term = term
        if boot_id not in (None, self.boot_id):
            return Failed(code="wrong_boot", message=f"this is boot {self.boot_id}")
        return None

    async def _reply(self, message: Message, reply: Contract) -> None:
        if not self.deaf:
            await answer(self.bus, message, reply)

    async def _on_term(self, message: Message) -> None:
        command: AnnounceTerm = decode(AnnounceTerm, message.data)
        await self._reply(message, self._refusal(command.term, None) or self.status())

    async def _on_prepare(self, message: Message) -> None:
        command: PrepareModel = decode(PrepareModel, message.data)
        refusal = self._refusal(command.term, command.boot_id)
        if refusal is None:
            self.prepares.append(command)
        await self._reply(message, refusal or Done())

    async def _on_drain(self, message: Message) -> None:
        command: DrainNode = decode(DrainNode, message.data)
        refusal = self._refusal(command.term, command.boot_id)
        if refusal is None:
            self.drains.append(command)
            self.draining = command.draining
        await self._reply(message, refusal or Done())
        await self.publish()

    async def _on_start(self, message: Message) -> None:
        command: StartInstance = decode(StartInstance, message.data)
        self.starts.append(command)
        refusal = self._refusal(command.term, command.boot_id) or self.refuse_start
        fresh = refusal is None and command.instance_id not in self.instances
        if fresh:
            now_s = self.clock.monotonic_s()
            self.instances[command.instance_id] = FakeInstance(command, InstanceState.STARTING, now_s, ordered_s=now_s)
        await self._reply(message, refusal or Done())
        if fresh:
            await self.publish()
            self._tasks.append(asyncio.create_task(self._become_ready(command.instance_id)))

    async def _become_ready(self, instance_id: str) -> None:
        if self.start_s:
            await self.clock.sleep(self.start_s)
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.STARTING:
            return
        if self.start_failure:
            await self.set_state(instance_id, InstanceState.FAILED, failure=self.start_failure)
            return
        instance.phases = StartPhases(fork_ms=10.0, load_ms=20.0, engine_ms=70.0)
        await self.set_state(instance_id, InstanceState.READY)

    async def _on_stop(self, message: Message) -> None:
        command: StopInstance = decode(StopInstance, message.data)
        self.stops.append(command)
        refusal = self._refusal(command.term, command.boot_id)
        instance = self.instances.get(command.instance_id)
        if refusal is None and command.only_if_idle and instance is not None and instance.running:
            refusal = Failed(code="busy", message=f"{instance.running} requests in hand", retryable=True)
        if refusal is None and instance is not None and not self.deaf:
            instance.state = InstanceState.STOPPED
        await self._reply(message, refusal or Done())
        if refusal is None:
            await self.publish()

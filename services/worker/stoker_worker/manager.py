"""The worker's instances as processes: start them through a zygote, hear from them, end them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import msgspec

from stoker_bus.events import EventPublisher
from stoker_contracts import events
from stoker_contracts.control import StartInstance
from stoker_contracts.models import DeviceKind, EngineKind, InstanceState
from stoker_core.clock import Clock
from stoker_core.errors import EngineFailed, InvalidMessage
from stoker_core.logging import get_logger
from stoker_worker.prepare import Preparer
from stoker_worker.processes import PidFiles, signal_name
from stoker_worker.settings import WorkerSettings
from stoker_worker.state import Instance, WorkerState
from stoker_worker.wire import (
    PACKET_BYTES_MAX,
    Broken,
    Busy,
    EngineReady,
    FromInstance,
    InstanceConfig,
    Load,
    Stop,
    Stopping,
    pack,
    packet_pair,
    unpack,
)
from stoker_worker.zygote.client import Zygote

log = get_logger("instances")

_STOP_REPLY_S = 2.0
_KILL_AFTER_DRAIN_S = 5.0


@dataclass(slots=True)
class _Process:
    channel: socket.socket
    handle: int | None = None  # pidfd
    up_or_gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    stop_replies: deque[asyncio.Future[bool]] = field(default_factory=deque)  # it answers in the order of asking
    broken: str = ""
    doomed: bool = False  # to be killed as soon as its pid is known


class InstanceManager:
    """Implements ZygoteListener. `changed` is called whenever the worker's status is worth sending anew."""

    def __init__(
        self,
        settings: WorkerSettings,
        state: WorkerState,
        zygotes: Mapping[EngineKind, Zygote],
        preparer: Preparer,
        pid_files: PidFiles,
        publisher: EventPublisher,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        self._settings, self._state, self._zygotes, self._preparer = settings, state, zygotes, preparer
        self._pid_files, self._publisher, self._clock, self._changed = pid_files, publisher, clock, changed
        self._processes: dict[str, _Process] = {}
        self._device_locks = {device.index: asyncio.Lock() for device in state.devices}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Hold the tasks of starts and stops until cancelled; then end every process."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await asyncio.Event().wait()
        finally:
            for instance_id in list(self._processes):
                self._kill(instance_id)

    def start(self, command: StartInstance) -> None:
        """Begin a start that the state allowed; its outcome shows in the state."""
        assert self._group is not None
        instance = Instance(command.instance_id, command.model, command.devices, started_at_s=self._clock.monotonic_s())
        self._state.instances[command.instance_id] = instance
        self._emit(events.INSTANCE_STARTING, instance)
        self._changed()
        self._group.create_task(self._start(instance, command.budget_ms / 1e3), name=f"start {instance.instance_id}")

    async def stop(self, instance_id: str, *, only_if_idle: bool) -> bool:
        """Have an instance finish and exit; False if it is busy and only an idle one was meant.

        One that still starts has nothing to finish and is killed: its device is free at once.
        """
        instance, process = self._state.instances.get(instance_id), self._processes.get(instance_id)
        if instance is None or not instance.live or instance.state == InstanceState.STOPPING:
            return True
        if process is None:  # it waits for its device still
            self._ended(instance, InstanceState.STOPPED, "")
            return True
        if instance.state == InstanceState.STARTING:
            self._leaves(instance)
            self._kill(instance_id)
            return True
        reply: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        try:
            process.channel.send(pack(Stop(only_if_idle=only_if_idle)))
            process.stop_replies.append(reply)
            async with asyncio.timeout(_STOP_REPLY_S):
                if not await reply:
                    return False
        except (TimeoutError, OSError) as error:
            log.warning("stop_unanswered", instance=instance_id, error=str(error) or "timeout")
            if only_if_idle:
                return False
        self._leaves(instance)
        return True

    async def stop_all(self) -> None:
        """Stop every instance and wait until all are gone."""
        live = [i.instance_id for i in self._state.instances.values() if i.live]
        await asyncio.gather(*(self.stop(instance_id, only_if_idle=False) for instance_id in live))
        for process in list(self._processes.values()):
            await process.gone.wait()

    # ZygoteListener

    def zygote_ready(self) -> None:
        self._changed()

    def zygote_lost(self, engine: EngineKind) -> None:
        if engine is EngineKind.VLLM:
            self._preparer.zygote_lost()
        self._changed()

    def prepared(self, architecture: str, failure: str) -> None:
        self._preparer.done(architecture, failure)

    def forked(self, instance_id: str, pid: int) -> None:
        instance, process = self._state.instances.get(instance_id), self._processes.get(instance_id)
        if process is None:
            return
        if instance is not None:
            instance.pid = pid
        self._pid_files.add(instance_id, pid)
        try:
            process.handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # dead already: its exit is reported next
        except OSError as error:  # no more descriptors. The end of its channel ends it, too
            process.broken = f"cannot be watched: {error}"
            process.channel.shutdown(socket.SHUT_RDWR)
            return
        if process.doomed:
            self._kill(instance_id)

    def exited(self, instance_id: str, status: int | None, reason: str) -> None:
        instance, process = self._state.instances.get(instance_id), self._processes.pop(instance_id, None)
        self._pid_files.remove(instance_id)
        if process is None:
            return
        # What it said last is still in the channel.
        self._read_packets(instance_id, process)
        asyncio.get_running_loop().remove_reader(process.channel)
        process.channel.close()
        if process.handle is not None:
            os.close(process.handle)
        for reply in process.stop_replies:
            if not reply.done():
                reply.set_result(True)
        process.up_or_gone.set()
        process.gone.set()
        if instance is None or not instance.live:
            return
        killed_as_asked = process.doomed and not process.broken
        if instance.state == InstanceState.STOPPING and (status == 0 or killed_as_asked):
            self._ended(instance, InstanceState.STOPPED, "")
        else:
            self._ended(instance, InstanceState.FAILED, process.broken or reason or _exit_text(status))

    # Inside

    async def _start(self, instance: Instance, budget_s: float) -> None:
        """Fork an instance and wait until it is ready or gone; one that takes longer than budget_s in all fails."""
        try:
            async with asyncio.timeout(budget_s), AsyncExitStack() as held:
                # Two engines that start on one device at once would each see the other's half-taken memory.
                for index in sorted(set(instance.devices)):
                    await held.enter_async_context(self._device_locks[index])
                await self._preparer.settled(instance.model)
                if instance.live:
                    await self._fork(instance)
        except TimeoutError:
            self._give_up(instance, f"not ready within {budget_s:g} s")
        except OSError as error:  # no more descriptors: this start fails, not the worker
            self._give_up(instance, f"cannot be forked: {error}")

    async def _fork(self, instance: Instance) -> None:
        ours, theirs = packet_pair()
        ours.setblocking(False)
        process = _Process(ours)
        self._processes[instance.instance_id] = process
        try:
            self._zygotes[instance.model.engine].fork(self._config(instance), theirs)
        except EngineFailed as error:
            self.exited(instance.instance_id, None, error.message)
            return
        finally:
            theirs.close()
        asyncio.get_running_loop().add_reader(ours, self._read_packets, instance.instance_id, process)
        await process.up_or_gone.wait()

    def _give_up(self, instance: Instance, reason: str) -> None:
        process = self._processes.get(instance.instance_id)
        if process is not None:
            process.broken = process.broken or reason
            self._kill(instance.instance_id)
        # With a pid its end is reported next. Without one nothing may ever be: the zygote may hang.
        if instance.live and (process is None or process.handle is None):
            self._ended(instance, InstanceState.FAILED, reason)

    def _config(self, instance: Instance) -> InstanceConfig:
        settings, state = self._settings, self._state
        device = next(d for d in state.devices if d.index == instance.devices[0])
        return InstanceConfig(
            instance_id=instance.instance_id,
            node=state.node,
            model=instance.model,
            device_kind=device.kind,
            devices=instance.devices,
            device_bytes=device.memory_bytes,
            nats_url=settings.nats_url,
            store_socket=settings.socket_path,
            threads=settings.threads if device.kind == DeviceKind.CPU else 1,
            batched_tokens_max=settings.batched_tokens_max,
            sim_step_s=settings.sim_step_s,
            lease_timeout_s=settings.lease_timeout_s,
            drain_s=settings.instance_drain_s,
            started_at_s=instance.started_at_s,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )

    def _read_packets(self, instance_id: str, process: _Process) -> None:
        while True:
            try:
                packet = process.channel.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                # Its exit status comes through the zygote; until then there is nothing to read.
                asyncio.get_running_loop().remove_reader(process.channel)
                return
            try:
                message = unpack(FromInstance, packet)
            except InvalidMessage as error:
                log.error("instance_packet_invalid", instance=instance_id, error=error.message)
                continue
            instance = self._state.instances.get(instance_id)
            if instance is not None:
                self._heard(instance, process, message)

    def _heard(self, instance: Instance, process: _Process, message: FromInstance) -> None:
        now_s = self._clock.monotonic_s()
        match message:
            case Load():
                instance.room, instance.running = message.room, message.running
                instance.arrivals, instance.finishes = message.arrivals, message.finishes
                instance.idle_since_s = (
                    now_s - message.idle_ms / 1e3 if message.idle_ms or not message.running else None
                )
                self._changed()
            case EngineReady():
                instance.phases = msgspec.structs.replace(
                    message.phases, announce_ms=(now_s - message.ready_at_s) * 1e3
                )
                instance.load_source, instance.load_origin = message.load_source, message.load_origin
                process.up_or_gone.set()
                if instance.state == InstanceState.STARTING:
                    instance.become(InstanceState.READY)
                    instance.room, instance.idle_since_s = instance.model.slots, now_s
                    self._emit(
                        events.INSTANCE_READY,
                        instance,
                        source=instance.load_source.value,  # as events named it before they had an origin
                        load_source=instance.load_source.value,
                        load_origin=instance.load_origin,
                        start_ms=round(instance.phases.start_ms),
                        phases=msgspec.to_builtins(instance.phases),
                    )
                    self._changed()
            case Broken():
                process.broken = f"{message.code}: {message.message}"
            case Stopping() | Busy():
                stops = isinstance(message, Stopping)
                if stops:  # whoever asked may have given up waiting for this answer
                    self._leaves(instance)
                if process.stop_replies and not (reply := process.stop_replies.popleft()).done():
                    reply.set_result(stops)

    def _leaves(self, instance: Instance) -> None:
        """It is about to end: say so, and see to it that it does."""
        if instance.state not in (InstanceState.STARTING, InstanceState.READY):
            return
        instance.become(InstanceState.STOPPING)
        self._emit(events.INSTANCE_STOPPING, instance)
        self._changed()
        assert self._group is not None
        self._group.create_task(self._kill_late(instance.instance_id), name=f"stop {instance.instance_id}")

    def _ended(self, instance: Instance, state: InstanceState, failure: str) -> None:
        if state == InstanceState.STOPPED and instance.state == InstanceState.READY:
            instance.become(InstanceState.STOPPING)
        instance.become(state)
        instance.failure, instance.ended_at_s, instance.running = failure, self._clock.monotonic_s(), 0
        if state == InstanceState.FAILED:
            log.error("instance_failed", instance=instance.instance_id, model=instance.model.name, reason=failure)
            self._emit(events.INSTANCE_FAILED, instance, reason=failure)
        else:
            log.info("instance_stopped", instance=instance.instance_id, model=instance.model.name)
            self._emit(events.INSTANCE_STOPPED, instance)
        self._changed()

    async def _kill_late(self, instance_id: str) -> None:
        await asyncio.sleep(self._settings.instance_drain_s + _KILL_AFTER_DRAIN_S)
        process = self._processes.get(instance_id)
        if process is not None:
            process.broken = process.broken or "it did not stop in time"
            log.warning("instance_killed", instance=instance_id, reason=process.broken)
            self._kill(instance_id)

    def _kill(self, instance_id: str) -> None:
        process = self._processes.get(instance_id)
        if process is None:
            return
        process.doomed = True
        if process.handle is None:
            return
        try:
            signal.pidfd_send_signal(process.handle, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _emit(self, event: tuple[str, str], instance: Instance, **data: object) -> None:
        self._publisher.emit(
            event,
            instance.instance_id,
            model=instance.model.name,
            node=self._state.node,
            devices=list(instance.devices),
            **data,
        )


def _exit_text(status: int | None) -> str:
    if status is None:
        return "it ended"
    if status < 0:
        return f"killed by {signal_name(-status)}"
    return f"exited with status {status}"

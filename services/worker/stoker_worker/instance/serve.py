"""The instance's asyncio side, in a thread beside the engine: NATS, token streams, the channel to the worker."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence

from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus, Message, answer, send
from stoker_contracts import subjects
from stoker_contracts.codec import Contract, decode
from stoker_contracts.inference import Ack, Cancel, Frames, Generate
from stoker_core.errors import Disconnected
from stoker_core.logging import get_logger
from stoker_worker.engines.base import EngineOutput
from stoker_worker.instance.host import Abort, Add, CommandQueue, Quit
from stoker_worker.instance.streams import Outgoing, Streams
from stoker_worker.wire import PACKET_BYTES_MAX, Busy, EngineReady, InstanceConfig, Load, Stop, Stopping, pack, unpack

log = get_logger("instance")

_TICK_S = 0.1
_LOAD_INTERVAL_S = 1.0
_LAST_ACKS_S = 2.0


class InstanceServer:
    """Lives in the event loop of its thread; `deliver`, `announce` and `engine_ended` come from the engine's."""

    def __init__(self, config: InstanceConfig, channel: socket.socket, commands: CommandQueue) -> None:
        self._config, self._channel, self._commands = config, channel, commands
        self._streams = Streams(slots=config.model.slots, now_s=time.monotonic())
        self._steps = 0
        self._reported: Load | None = None
        self._reported_at_s = 0.0
        self._outbox: asyncio.Queue[Outgoing] = asyncio.Queue(maxsize=4096)
        self._stopping = asyncio.Event()
        self._engine_ended = asyncio.Event()
        self._moved = asyncio.Event()  # a stream advanced, was acked or ended
        self._listening = False
        self._ready: EngineReady | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bus: Bus | None = None

    # Called from the engine's thread.

    def deliver(self, outputs: list[EngineOutput]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._produced, outputs)

    def announce(self, ready: EngineReady) -> None:
        """The engine takes requests. The worker is told once they can arrive as well."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._engine_is_ready, ready)

    def engine_ended(self) -> None:
        """Nothing is delivered after this; the loop may end."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._engine_ended.set)

    # The event loop's side.

    def attach(self) -> None:
        """Bind to the running loop; before this, nothing may be delivered."""
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Serve until stopped. The worker's end of the channel closing ends the process at once."""
        assert self._loop is not None
        config = self._config
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._from_worker)
        bus = self._bus = await NatsBus.connect(config.nats_url, name=f"instance {config.instance_id}")
        node, instance_id = config.node, config.instance_id
        await bus.subscribe(subjects.instance_generate(node, instance_id), self._on_generate)
        await bus.subscribe(subjects.instance_ack(node, instance_id), self._on_ack)
        await bus.subscribe(subjects.instance_cancel(node, instance_id), self._on_cancel)
        self._listening = True
        if self._ready is not None:
            self._open(self._ready)
        async with asyncio.TaskGroup() as group:  # an instance that cannot send must not live on in silence
            tasks = [group.create_task(self._send_frames(bus)), group.create_task(self._tick_forever(bus))]
            await self._stopping.wait()
            await self._drain()
            for task in tasks:
                task.cancel()
        self._commands.put(Quit())
        # The loop must outlive the engine's last `deliver`. The worker ends an instance that takes too long.
        await self._engine_ended.wait()
        await bus.close()

    async def _on_generate(self, message: Message) -> None:
        assert self._bus is not None
        generate = decode(Generate, message.data)
        reply, request = self._streams.generate(generate, time.monotonic())
        if request is not None:
            self._commands.put(Add(request))
        await answer(self._bus, message, reply)
        self._report()

    async def _on_ack(self, message: Message) -> None:
        self._enqueue(self._streams.ack(decode(Ack, message.data), time.monotonic()))
        self._report()

    async def _on_cancel(self, message: Message) -> None:
        self._abort(self._streams.cancel(decode(Cancel, message.data), time.monotonic()))
        self._report()

    def _produced(self, outputs: Sequence[EngineOutput]) -> None:
        self._steps += 1
        outgoing, abort = self._streams.produced(outputs, time.monotonic())
        self._abort(abort)
        self._enqueue(outgoing)
        if any(output.finish for output in outputs):
            self._report()

    def _engine_is_ready(self, ready: EngineReady) -> None:
        self._ready = ready
        if self._listening:
            self._open(ready)

    def _open(self, ready: EngineReady) -> None:
        self._streams.became_ready(time.monotonic())
        self._tell_worker(ready)
        self._report()

    def _abort(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._commands.put(Abort(key))

    def _enqueue(self, outgoing: Sequence[Outgoing]) -> None:
        for item in outgoing:
            try:
                self._outbox.put_nowait(item)
            except asyncio.QueueFull:
                return  # frames are kept until acked: what is not sent now is sent again

    async def _send_frames(self, bus: Bus) -> None:
        while True:
            item = await self._outbox.get()
            frames = Frames(
                node=self._config.node,
                instance_id=self._config.instance_id,
                frames=item.frames,
                room=self._streams.room,
                steps=self._steps,
            )
            try:
                await send(bus, subjects.gateway_frames(item.gateway_id), frames)
            except Disconnected:
                continue  # kept until acked

    async def _tick_forever(self, bus: Bus) -> None:
        up_since_s, reconnects = time.monotonic(), bus.reconnects
        while True:
            await asyncio.sleep(_TICK_S)
            if not bus.connected or bus.reconnects != reconnects:
                up_since_s, reconnects = time.monotonic(), bus.reconnects
            outgoing, abort = self._streams.tick(time.monotonic(), link_up_since_s=up_since_s)
            self._abort(abort)
            self._enqueue(outgoing)
            self._report()

    def _report(self) -> None:
        """Tell the worker the load, on a change and every second."""
        self._moved.set()
        streams, now_s = self._streams, time.monotonic()
        if not streams.ready:
            return
        load = Load(
            room=streams.room,
            running=streams.running,
            arrivals=streams.arrivals,
            finishes=streams.finishes,
            idle_ms=streams.idle_ms(now_s),
        )
        before = self._reported
        same = before is not None and (before.room, before.running, before.arrivals, before.finishes) == (
            load.room,
            load.running,
            load.arrivals,
            load.finishes,
        )
        if same and now_s - self._reported_at_s < _LOAD_INTERVAL_S:
            return
        self._reported, self._reported_at_s = load, now_s
        self._tell_worker(load)

    def _tell_worker(self, message: Contract) -> None:
        try:
            self._channel.send(pack(message))
        except BlockingIOError:
            log.warning("worker_slow", message=type(message).__name__)
        except OSError:
            os._exit(1)

    def _from_worker(self) -> None:
        try:
            packet = self._channel.recv(PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            os._exit(1)  # the worker is gone; what it held must be free for the next one
        stop = unpack(Stop, packet)
        if stop.only_if_idle and self._streams.open:
            self._tell_worker(Busy())
            return
        self._streams.stopping = True
        self._tell_worker(Stopping())
        self._stopping.set()

    async def _drain(self) -> None:
        """Requests in hand finish; their last frames get a moment to be acked."""
        await self._until(lambda: self._streams.running == 0, self._config.drain_s)
        await self._until(lambda: self._streams.open == 0, min(_LAST_ACKS_S, self._config.drain_s))

    async def _until(self, done: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not done():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            log.warning("drain_timeout", timeout_s=timeout_s, running=self._streams.running)

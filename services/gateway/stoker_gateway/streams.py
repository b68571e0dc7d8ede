"""Open streams between instances and clients: frames in; acks, cancels and the judgement of silence out."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from stoker_bus.port import Bus, Message, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.inference import INSTANCE_SILENCE_S, STEP_HANG_S, Ack, Cancel, Frames, Wanted
from stoker_core.clock import Clock
from stoker_core.errors import BusError, InstanceLost
from stoker_core.logging import get_logger
from stoker_gateway.link import Link
from stoker_gateway.queues import Dispatcher
from stoker_gateway.session import Session, Verdict

log = get_logger("streams")


@dataclass(eq=False)
class Stream:
    """One request in hand.

    changed: set when the session has news for its reader.  holding: it takes up room at its instance.
    """

    session: Session
    model_id: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    holding: bool = False


@dataclass
class _Heard:
    """When an instance with streams was last heard, and when its step counter last moved."""

    at_s: float
    steps: int
    steps_at_s: float


class Streams:
    def __init__(self, bus: Bus, gateway_id: str, dispatcher: Dispatcher, clock: Clock) -> None:
        self._bus = bus
        self._gateway_id = gateway_id
        self._dispatcher = dispatcher
        self._clock = clock
        self._open: dict[str, Stream] = {}
        self._heard: dict[str, _Heard] = {}
        self._last_acks: list[tuple[tuple[str, str], Wanted]] = []  # of finishes whose readers are gone already

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session: Session, model_id: str) -> Stream:
        """Accept frames for a request from now on."""
        stream = Stream(session, model_id)
        self._open[session.request_id] = stream
        return stream

    def accepted(self, stream: Stream) -> None:
        """The instance of the session's attempt admitted the request; its room is held until the session ends."""
        stream.holding = True
        if stream.session.ended:  # short answers overtake the admission
            self._release(stream)

    async def close(self, stream: Stream) -> None:
        """The reader is done. Whatever the instance still works on is cancelled."""
        session = stream.session
        self._open.pop(session.request_id, None)
        if session.finish is not None:
            self._last_acks.append(((session.node, session.instance_id), session.wanted))
        if stream.holding:
            try:  # before others are let in, so that they find the room
                await self.cancel(session.node, session.instance_id, session.request_id, session.attempt)
            finally:
                self._release(stream)

    async def cancel(self, node: str, instance_id: str, request_id: str, attempt: int) -> None:
        """Tell an instance to stop. If it does not hear it, its next frame or this gateway's lease ends the attempt."""
        message = Cancel(request_id=request_id, attempt=attempt)
        try:
            await send(self._bus, subjects.instance_cancel(node, instance_id), message)
        except BusError:
            log.info("cancel_unsent", request=request_id, instance=instance_id)

    def lose(self, instance_id: str, why: str) -> None:
        """End the streams of an instance that is no more."""
        lost = [s for s in self._open.values() if s.holding and s.session.instance_id == instance_id]
        for stream in lost:
            stream.session.fail(InstanceLost(f"the instance that generated the answer was lost: {why}"))
            self._release(stream)
            stream.changed.set()
        if lost:
            log.warning("instance_lost", instance=instance_id, reason=why, streams=len(lost))

    async def on_frames(self, message: Message) -> None:
        frames: Frames = decode(Frames, message.data)
        self._hear(frames)
        strangers = []
        for frame in frames.frames:
            stream = self._open.get(frame.request_id)
            verdict = Verdict.STRANGER
            if stream is not None:
                verdict = stream.session.on_frame(frames.node, frames.instance_id, frame)
                if verdict is Verdict.ACCEPTED:
                    stream.changed.set()
                    if stream.session.failure is not None and stream.holding:
                        strangers.append((frame.request_id, frame.attempt))  # refused: nobody will read the rest
                    if stream.session.ended:
                        self._release(stream)
            if verdict is Verdict.STRANGER:
                strangers.append((frame.request_id, frame.attempt))
        for request_id, attempt in strangers:
            await self.cancel(frames.node, frames.instance_id, request_id, attempt)
        if model_id := self._dispatcher.routes.on_room(frames.instance_id, frames.room):
            self._dispatcher.wake(model_id)

    async def ack(self) -> None:
        """Ack every accepted stream, by instance; this also renews the gateway's lease there. Raises Disconnected."""
        wanted: dict[tuple[str, str], list[Wanted]] = defaultdict(list)
        for stream in self._open.values():
            if stream.holding or stream.session.finish is not None:
                wanted[stream.session.node, stream.session.instance_id].append(stream.session.wanted)
        last, self._last_acks = self._last_acks, []
        for where, one in last:
            wanted[where].append(one)
        for (node, instance_id), ones in wanted.items():
            message = Ack(gateway_id=self._gateway_id, wanted=tuple(ones))
            await send(self._bus, subjects.instance_ack(node, instance_id), message)

    def judge(self, link: Link) -> None:
        """Lose instances that fell silent or hang. Must be called several times within INSTANCE_SILENCE_S."""
        now_s, up_since_s = self._clock.monotonic_s(), link.up_since_s()
        busy = {s.session.instance_id for s in self._open.values() if s.holding}
        self._heard = {i: self._heard.get(i) or _Heard(now_s, 0, now_s) for i in busy}
        for instance_id, heard in list(self._heard.items()):
            if now_s - max(heard.at_s, up_since_s) > INSTANCE_SILENCE_S:
                self.lose(instance_id, f"silent for {INSTANCE_SILENCE_S:g} s")
            elif heard.steps and now_s - max(heard.steps_at_s, up_since_s) > STEP_HANG_S:
                self.lose(instance_id, f"no step for {STEP_HANG_S:g} s")

    def _hear(self, frames: Frames) -> None:
        heard = self._heard.get(frames.instance_id)
        if heard is not None:
            heard.at_s = self._clock.monotonic_s()
            if frames.steps != heard.steps:
                heard.steps, heard.steps_at_s = frames.steps, heard.at_s

    def _release(self, stream: Stream) -> None:
        if stream.holding:
            stream.holding = False
            self._dispatcher.routes.release(stream.session.instance_id)
            self._dispatcher.wake(stream.model_id)

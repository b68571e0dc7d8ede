"""The bus inside one process and event loop: for tests and simulation. Passes the contract suite that NATS passes.

Make one MemoryBroker a test; each `connect` is what a process's connection would be.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Mapping

from stoker_bus.delivery import Delivery
from stoker_bus.port import Handler, Message, StreamMessage, Subscription
from stoker_bus.subjects import check_pattern, check_subject, headers_bytes, matches
from stoker_contracts.subjects import EVENTS_ALL
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import BusError, Disconnected, MessageTooLarge, NoResponders, RequestTimeout

MAX_PAYLOAD_BYTES = 1024 * 1024
STREAM_MESSAGES_MAX = 100_000
DRAIN_TIMEOUT_S = 5.0


class _Subscription:
    def __init__(self, bus: MemoryBus, delivery: Delivery, queue: str) -> None:
        self.bus, self.delivery, self.queue = bus, delivery, queue

    @property
    def pattern(self) -> str:
        return self.delivery.subject

    @property
    def dropped(self) -> int:
        """Messages dropped because too many were waiting."""
        return self.delivery.dropped

    async def stop(self) -> None:
        self.bus.broker.unsubscribe(self)
        self.delivery.stop()


class MemoryBroker:
    """What NATS would be: subscriptions, open requests, the event stream, and faults for tests."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._subscriptions: list[_Subscription] = []
        self._turns: dict[tuple[str, str], int] = {}
        self._requests: dict[str, tuple[MemoryBus, asyncio.Future[Message]]] = {}
        self._inboxes = itertools.count(1)
        self._stream: deque[StreamMessage] = deque(maxlen=STREAM_MESSAGES_MAX)
        self._sequences: dict[str, int] = {}
        self._changed = asyncio.Event()

    def connect(self) -> MemoryBus:
        return MemoryBus(self)

    def disconnect(self, bus: MemoryBus) -> None:
        """Cut one connection: its calls raise Disconnected and nothing reaches it until `reconnect`."""
        bus.connected = False
        for owner, answer in list(self._requests.values()):
            if owner is bus and not answer.done():
                answer.set_exception(Disconnected())
        self._notify()

    def reconnect(self, bus: MemoryBus) -> None:
        """Undo `disconnect`. What was sent meanwhile is gone; the event stream is not."""
        if not bus.connected:
            bus.connected = True
            bus.reconnects += 1
        self._notify()

    def subscribe(self, subscription: _Subscription) -> None:
        self._subscriptions.append(subscription)

    def unsubscribe(self, subscription: _Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def deliver(self, message: Message) -> int:
        """Hand a message to every subscription and one member of each queue group; returns how many took it."""
        waiting = self._requests.get(message.subject)
        if waiting is not None:
            owner, answer = waiting
            if owner.connected and not answer.done():
                answer.set_result(message)
            return 1
        taken = 0
        groups: dict[tuple[str, str], list[_Subscription]] = {}
        for subscription in self._subscriptions:
            if subscription.bus.connected and matches(subscription.pattern, message.subject):
                if subscription.queue:
                    groups.setdefault((subscription.pattern, subscription.queue), []).append(subscription)
                else:
                    subscription.delivery.offer(message)
                    taken += 1
        for group, members in groups.items():
            turn = self._turns.get(group, 0)
            self._turns[group] = turn + 1
            members[turn % len(members)].delivery.offer(message)
            taken += 1
        return taken

    def open_inbox(self, bus: MemoryBus) -> tuple[str, asyncio.Future[Message]]:
        inbox = f"_INBOX.memory.{next(self._inboxes)}"
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._requests[inbox] = (bus, answer)
        answer.add_done_callback(lambda _: self._requests.pop(inbox, None))
        return inbox, answer

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    def append(self, subject: str, data: bytes, message_id: str) -> int:
        known = self._sequences.get(message_id)
        if known is not None:
            return known
        sequence = self.last_sequence + 1
        if len(self._stream) == STREAM_MESSAGES_MAX:
            self._sequences.pop(next(iter(self._sequences)))  # insertion order is stream order
        self._stream.append(StreamMessage(subject, data, sequence, self._clock.utc()))
        self._sequences[message_id] = sequence
        self.deliver(Message(subject, data))
        self._notify()
        return sequence

    @property
    def last_sequence(self) -> int:
        return self._stream[-1].sequence if self._stream else 0

    def stored(self, pattern: str, first: int) -> list[StreamMessage]:
        return [m for m in self._stream if m.sequence >= first and matches(pattern, m.subject)]

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next append, disconnect, reconnect or close; each waiter sees it once."""
        return self._changed

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def forget(self, bus: MemoryBus) -> None:
        self.disconnect(bus)
        self._subscriptions = [s for s in self._subscriptions if s.bus is not bus]

    def subscriptions_of(self, bus: MemoryBus) -> list[_Subscription]:
        return [s for s in self._subscriptions if s.bus is bus]


class MemoryBus:
    """Implements `stoker_bus.port.Bus`. Made by `MemoryBroker.connect`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.connected = True
        self.reconnects = 0
        self._closed = False

    async def publish(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        self._check(subject, data, headers)
        self.broker.deliver(Message(subject, data, dict(headers or {})))

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Message:
        self._check(subject, data, headers)
        inbox, answer = self.broker.open_inbox(self)
        try:
            if self.broker.deliver(Message(subject, data, dict(headers or {}), inbox)) == 0:
                raise NoResponders(subject)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise RequestTimeout(subject, timeout_s) from error
        finally:
            answer.cancel()

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_max: int = 4096, concurrency: int = 1
    ) -> Subscription:
        check_pattern(subject)
        self._check_connected()
        delivery = Delivery(subject, handler, pending_max=pending_max, concurrency=concurrency)
        subscription = _Subscription(self, delivery, queue)
        self.broker.subscribe(subscription)
        return subscription

    async def append(self, subject: str, data: bytes, *, message_id: str) -> int:
        self._check(subject, data, {"Nats-Msg-Id": message_id})
        if not matches(EVENTS_ALL, subject):
            raise BusError(f"no stream takes events on {subject}")
        return self.broker.append(subject, data, message_id)

    async def follow(
        self, subject: str, *, since_sequence: int | None = None, follow: bool = True
    ) -> AsyncIterator[StreamMessage]:
        check_pattern(subject)
        self._check_connected()
        last = self.broker.last_sequence
        following = last + 1 if since_sequence is None else since_sequence
        while True:
            changed = self.broker.changed
            for message in self.broker.stored(subject, following) if self.connected else ():
                if not follow and message.sequence > last:
                    return
                yield message
                following = message.sequence + 1
                if not self.connected:
                    break
            if self._closed:
                raise Disconnected("the message bus was closed")
            if not follow and self.connected:
                return
            await changed.wait()

    async def close(self) -> None:
        if self._closed:
            return
        for subscription in self.broker.subscriptions_of(self):
            self.broker.unsubscribe(subscription)
            await subscription.delivery.drain(DRAIN_TIMEOUT_S, closer=asyncio.current_task())
        self._closed = True
        self.broker.forget(self)

    def _check(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> None:
        check_subject(subject)
        size = len(data) + headers_bytes(headers)
        self._check_connected()
        if size > MAX_PAYLOAD_BYTES:
            raise MessageTooLarge(subject, size, MAX_PAYLOAD_BYTES)

    def _check_connected(self) -> None:
        if self._closed:
            raise Disconnected("the message bus was closed")
        if not self.connected:
            raise Disconnected()

"""What services need of a message bus. `stoker_bus.nats` and `stoker_bus.memory` pass one contract suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from stoker_contracts.codec import Contract, decode, encode
from stoker_core.tracing import inject

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Message:
    """A message as received. reply: where an answer is awaited, or ''."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: str = ""


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """A message of the event stream. sequence: its position in the stream, from 1."""

    subject: str
    data: bytes
    sequence: int
    time: datetime
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Message], Awaitable[None]]


class Subscription(Protocol):
    async def stop(self) -> None:
        """No handler starts after this returns; handlers that run go on."""
        ...


class Bus(Protocol):
    """At-most-once messages, plus one replayable stream of events.

    Every call raises Disconnected while there is no connection: nothing is buffered to arrive late.
    """

    @property
    def connected(self) -> bool: ...

    @property
    def reconnects(self) -> int:
        """How often the link was lost and came back. An observer of silence checks that it did not change."""
        ...

    async def publish(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Send once; nobody may listen. Raises Disconnected, MessageTooLarge."""
        ...

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Message:
        """Send and await one answer. Raises NoResponders at once, RequestTimeout, Disconnected."""
        ...

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_max: int = 4096, concurrency: int = 1
    ) -> Subscription:
        """Call `handler` for each message; `*` and `>` as in NATS. Survives reconnects.

        queue: a group of which one member gets each message.  concurrency: handlers at once; 1 keeps order.
        Beyond pending_max waiting messages the newest are dropped, counted and logged. A handler's exception is
        logged and ends that message only.
        """
        ...

    async def append(self, subject: str, data: bytes, *, message_id: str) -> int:
        """Put one message in the event stream, once per message_id; returns its sequence. Raises Disconnected, RequestTimeout."""
        ...

    def follow(
        self, subject: str, *, since_sequence: int | None = None, follow: bool = True
    ) -> AsyncIterator[StreamMessage]:
        """The event stream's messages whose subjects match, in order.

        since_sequence: replay from there (1: everything kept); None: only what comes.
        follow: False ends after what is there now. Survives reconnects without loss or repeats.
        """
        ...

    async def close(self) -> None:
        """Finish handlers' answers, then disconnect. Idempotent."""
        ...


async def send(bus: Bus, subject: str, message: Contract) -> None:
    """Publish a contract message with the current trace context."""
    await bus.publish(subject, encode(message, subject=subject), headers=inject())


async def ask(bus: Bus, subject: str, message: Contract, reply: type[R] | Any, *, timeout_s: float) -> R:
    """Request with a contract message and decode the answer as `reply` (a Contract or a union of them)."""
    answer = await bus.request(subject, encode(message, subject=subject), timeout_s=timeout_s, headers=inject())
    decoded: R = decode(reply, answer.data)
    return decoded


async def answer(bus: Bus, message: Message, reply: Contract) -> None:
    """Answer a request. Without a reply subject nobody waits, and nothing is sent."""
    if message.reply:
        await bus.publish(message.reply, encode(reply, subject=message.reply))

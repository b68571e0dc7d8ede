"""The event stream on JetStream: made where it is missing, appended to once per id, followed without gaps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import datetime

from nats import errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError

from stoker_bus.nats_link import Link
from stoker_bus.port import StreamMessage
from stoker_contracts.subjects import EVENTS_ALL, EVENTS_STREAM
from stoker_core.errors import BusError
from stoker_core.logging import get_logger

log = get_logger("bus")

MAX_AGE_S = 7 * 24 * 3600
MAX_BYTES = 256 * 1024 * 1024
DUPLICATE_WINDOW_S = 120
TIMEOUT_S = 5.0
BATCH = 256
PULL_EXPIRES_S = 10.0
HEARTBEAT_S = 1.0
SILENCE_S = 3 * HEARTBEAT_S
CONSUMER_IDLE_S = 60.0
_STREAM_EXISTS_OTHERWISE = 10058
_DISABLED = "JetStream is not enabled at this NATS server; the event stream needs it"


class _Gap(Exception):
    """The consumer cannot be continued; a new one starts after the last message seen."""


async def ensure_stream(link: Link) -> None:
    """Make STOKER_EVENTS if it is missing; one that exists with other limits is left as its operator set it."""
    if link.stream_ready:
        return
    config = api.StreamConfig(
        name=EVENTS_STREAM,
        subjects=[EVENTS_ALL],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.OLD,
        max_age=MAX_AGE_S,
        max_bytes=MAX_BYTES,
        duplicate_window=DUPLICATE_WINDOW_S,
        num_replicas=1,
    )
    async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
        try:
            await client.jetstream(timeout=TIMEOUT_S).add_stream(config)
        except ServiceUnavailableError as error:
            raise BusError(_DISABLED) from error
        except APIError as error:
            if error.err_code != _STREAM_EXISTS_OTHERWISE:
                raise BusError(f"the event stream cannot be made: {error.description}") from error
    link.stream_ready = True


async def append(link: Link, subject: str, data: bytes, message_id: str) -> int:
    """Sequence of the message in the stream; the first one's if `message_id` was appended before."""
    for last_try in (False, True):
        await ensure_stream(link)
        async with link.call(subject, TIMEOUT_S) as client:
            headers = {api.Header.MSG_ID.value: message_id}
            try:
                ack = await client.jetstream().publish(subject, data, timeout=TIMEOUT_S, headers=headers)
            except NoStreamResponseError as error:
                link.stream_ready = False  # somebody deleted it
                if last_try:
                    raise BusError(f"no stream takes events on {subject}") from error
                continue
            except APIError as error:
                raise BusError(f"the event stream refused a message: {error.description}") from error
            return ack.seq
    raise AssertionError("the last try returns or raises")


async def _newest(link: Link) -> tuple[int, datetime | None]:
    """Sequence of the newest message (0 in an empty, new stream), and when the stream was made."""
    link.stream_ready = False  # somebody may have deleted it
    await ensure_stream(link)
    async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
        try:
            info = await client.jetstream(timeout=TIMEOUT_S).stream_info(EVENTS_STREAM)
        except APIError as error:
            raise BusError(f"the event stream cannot be read: {error.description}") from error
    return info.state.last_seq, info.created


class Cursor:
    """Where a follower is in the stream. Made by `start`."""

    def __init__(self, subject: str, next_sequence: int, end: int | None, created: datetime | None) -> None:
        self.subject = subject
        self.next = next_sequence  # the one it wants to see next
        self.end = end  # the last one it wants; None: all to come
        self._created = created

    @classmethod
    async def start(cls, link: Link, subject: str, since_sequence: int | None, follow: bool) -> Cursor:
        last, created = await _newest(link)
        first = last + 1 if since_sequence is None else max(1, since_sequence)
        return cls(subject, first, None if follow else last, created)

    @property
    def done(self) -> bool:
        return self.end is not None and self.next > self.end

    async def read(self, link: Link) -> AsyncGenerator[StreamMessage, None]:
        """Messages from `next` on, moving it, until `end`. Raises _Gap and BusErrors; see `may_go_on`."""
        last, created = await _newest(link)
        if created != self._created:
            # Another stream under the same name: the store was lost and made anew, sequences begin again.
            log.warning("event_stream_replaced", expected=self.next, last=last)
            self.next, self.end, self._created = 1, None if self.end is None else last, created
        inbox = await _Inbox.open(link)
        try:
            consumer, pending = await self._consume(link)
            try:
                if self.end is not None and pending == 0:
                    self.next = self.end + 1
                delivered = 0
                while not self.done:
                    wanted = delivered + BATCH
                    await self._pull(link, consumer, inbox.subject)
                    while delivered < wanted and not self.done and (message := await inbox.next(link)):
                        delivered += 1
                        place = message.metadata
                        if place.sequence.consumer != delivered:
                            raise _Gap("missed messages")
                        self.next = place.sequence.stream + 1
                        if self.end is not None and place.num_pending == 0:
                            self.next = max(self.next, self.end + 1)
                        if self.end is None or place.sequence.stream <= self.end:
                            yield _stream_message(message)
            finally:
                await self._forget(link, consumer)
        finally:
            await inbox.close()

    async def _consume(self, link: Link) -> tuple[str, int]:
        """Name of a new consumer from `next` on, and how many messages wait for it."""
        config = api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=self.next,
            ack_policy=api.AckPolicy.NONE,
            filter_subject=self.subject,
            inactive_threshold=CONSUMER_IDLE_S,
            mem_storage=True,
            num_replicas=1,
        )
        async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
            try:
                info = await client.jetstream(timeout=TIMEOUT_S).add_consumer(EVENTS_STREAM, config)
            except APIError as error:
                raise BusError(f"the event stream cannot be followed: {error.description}") from error
            return info.name, info.num_pending or 0

    async def _pull(self, link: Link, consumer: str, inbox: str) -> None:
        request = {
            "batch": BATCH,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
            await client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{consumer}", json.dumps(request).encode(), inbox
            )

    async def _forget(self, link: Link, consumer: str) -> None:
        """Spare the server the minute after which it drops an idle consumer by itself."""
        with suppress(BusError, APIError):
            async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
                await client.jetstream(timeout=TIMEOUT_S).delete_consumer(EVENTS_STREAM, consumer)


class _Inbox:
    """Where pulled messages arrive. Bounded: the server sends no more than was pulled for."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._arrived: asyncio.Queue[Msg] = asyncio.Queue(maxsize=2 * BATCH)
        self._subscription: Subscription | None = None

    @classmethod
    async def open(cls, link: Link) -> _Inbox:
        async with link.call(EVENTS_STREAM, TIMEOUT_S) as client:
            inbox = cls(client.new_inbox())
            inbox._subscription = await client.subscribe(inbox.subject, cb=inbox._arrive)
            return inbox

    async def next(self, link: Link) -> Msg | None:
        """The next message, or None when the pull is over and another is due.

        Raises _Gap if the consumer ended, RequestTimeout if not even a heartbeat came.
        """
        while True:
            async with link.call(EVENTS_STREAM, SILENCE_S):
                message = await self._arrived.get()
            status = (message.headers or {}).get(api.Header.STATUS.value)
            if not status:
                return message
            if status in (api.StatusCode.REQUEST_TIMEOUT, api.StatusCode.NO_MESSAGES):
                return None
            if status != api.StatusCode.CONTROL_MESSAGE:
                raise _Gap(f"consumer status {status}")

    async def close(self) -> None:
        if self._subscription is not None:
            with suppress(errors.ConnectionClosedError):
                await self._subscription.unsubscribe()

    async def _arrive(self, message: Msg) -> None:
        self._arrived.put_nowait(message)


def may_go_on(error: Exception) -> bool:
    """Whether a follower that has begun tries again after `error`, with a new consumer."""
    return isinstance(error, _Gap) or (isinstance(error, BusError) and error.retryable)


def _stream_message(message: Msg) -> StreamMessage:
    place = message.metadata
    return StreamMessage(
        subject=message.subject,
        data=message.data,
        sequence=place.sequence.stream,
        time=place.timestamp,
        headers={k: v for k, v in (message.headers or {}).items() if not k.startswith("Nats-")},
    )

"""The bus on NATS. Reconnects for as long as it lives; while it does, every call raises Disconnected."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from nats import errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsPySubscription

from stoker_bus import nats_stream
from stoker_bus.delivery import Delivery
from stoker_bus.nats_link import Link
from stoker_bus.port import Handler, Message, StreamMessage, Subscription
from stoker_bus.subjects import check_pattern, check_subject, headers_bytes
from stoker_core.errors import BusError, BusLost, BusRefused, Disconnected, MessageTooLarge
from stoker_core.logging import get_logger

log = get_logger("bus")

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
SUBSCRIBE_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 5.0


def backoff_s(attempt: int) -> float:
    """Seconds before try number `attempt` (from 0): doubling up to BACKOFF_MAX_S, a random half of it taken off.

    Random from the kernel: forked siblings that lose the link together must not come back together.
    """
    ceiling = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(attempt, 16))
    jitter = int.from_bytes(os.urandom(2), "big") / 0xFFFF
    return ceiling * (1.0 - 0.5 * jitter)


class _Subscription:
    def __init__(self, bus: NatsBus, delivery: Delivery, queue: str) -> None:
        self._bus, self._delivery, self._queue = bus, delivery, queue
        self._inner: NatsPySubscription | None = None

    @property
    def dropped(self) -> int:
        """Messages dropped because too many were waiting."""
        return self._delivery.dropped

    async def attach(self, link: Link) -> None:
        """Subscribe on a new link."""
        self._inner = await link.client.subscribe(self._delivery.subject, queue=self._queue, cb=self._receive)

    async def stop(self) -> None:
        self._bus._subscriptions.discard(self)
        self._delivery.stop()
        await self.detach()

    async def detach(self) -> None:
        """Tell the server to send no more; it already knows if the link is gone."""
        inner, self._inner = self._inner, None
        if inner is not None:
            with contextlib.suppress(errors.ConnectionClosedError):
                await inner.unsubscribe()

    async def drain(self, closer: asyncio.Task[Any] | None) -> None:
        await self.detach()
        await self._delivery.drain(DRAIN_TIMEOUT_S, closer=closer)

    async def _receive(self, message: Msg) -> None:
        self._delivery.offer(_message(message))


class NatsBus:
    """Implements `stoker_bus.port.Bus`. Made by `connect`."""

    def __init__(self, url: str, name: str, link: Link) -> None:
        self._url, self._name = url, name
        self._link = link
        self._up = asyncio.Event()  # set: connected with all subscriptions in force, or never again
        self._up.set()
        self._reconnects = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._subscriptions: set[_Subscription] = set()
        self._keeper = asyncio.create_task(self._keep_connected(), name="bus keeper")
        self._keeper.add_done_callback(self._keeper_ended)

    @classmethod
    async def connect(cls, url: str, *, name: str, timeout_s: float = 30.0) -> NatsBus:
        """Connect, trying again for `timeout_s`.

        name: shown by the server.  Raises Disconnected after `timeout_s`, BusRefused at once for wrong credentials.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        for attempt in itertools.count():
            try:
                return cls(url, name, await Link.open(url, name=name))
            except BusRefused:
                raise
            except Disconnected as error:
                wait_s = backoff_s(attempt)
                if asyncio.get_running_loop().time() + wait_s > deadline_s:
                    raise
                if attempt == 0:
                    log.info("bus_waiting", error=error.message)
            await asyncio.sleep(wait_s)
        raise AssertionError("the loop returns or raises")

    @property
    def connected(self) -> bool:
        return not self._closing and self._link.alive and self._up.is_set()

    @property
    def reconnects(self) -> int:
        return self._reconnects

    async def publish(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        link = self._checked(subject, data, headers)
        try:
            await link.client.publish(subject, data, headers=dict(headers) if headers else None)
        except (errors.Error, OSError) as error:
            raise link.translated(error) from error

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Message:
        link = self._checked(subject, data, headers)
        async with link.call(subject, timeout_s) as client:
            sent = dict(headers) if headers else None
            return _message(await client.request(subject, data, timeout=timeout_s + 1, headers=sent))

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_max: int = 4096, concurrency: int = 1
    ) -> Subscription:
        check_pattern(subject)
        link = self._current()
        delivery = Delivery(subject, handler, pending_max=pending_max, concurrency=concurrency)
        subscription = _Subscription(self, delivery, queue)
        try:
            async with link.call(subject, SUBSCRIBE_TIMEOUT_S):
                await subscription.attach(link)
            await link.barrier(subject, SUBSCRIBE_TIMEOUT_S)  # from here on, messages sent by anybody arrive
        except BaseException:
            await subscription.stop()
            raise
        self._subscriptions.add(subscription)
        return subscription

    async def append(self, subject: str, data: bytes, *, message_id: str) -> int:
        link = self._checked(subject, data, {"Nats-Msg-Id": message_id})
        return await nats_stream.append(link, subject, data, message_id)

    async def follow(
        self, subject: str, *, since_sequence: int | None = None, follow: bool = True
    ) -> AsyncIterator[StreamMessage]:
        """As the port says; "what only comes" begins when the iteration does."""
        check_pattern(subject)
        cursor = await nats_stream.Cursor.start(self._current(), subject, since_sequence, follow)
        attempt = 0
        while not cursor.done:
            await self._up.wait()
            try:
                async with contextlib.aclosing(cursor.read(self._current())) as messages:
                    async for message in messages:
                        yield message
                        attempt = 0
            except Exception as error:
                if self._closing or not nats_stream.may_go_on(error):
                    raise
                _log_attempt("events_interrupted", attempt, next=cursor.next, error=str(error))
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1

    async def close(self) -> None:
        if self._keeper.done() and self._closing:
            return
        closer = asyncio.current_task()
        await asyncio.gather(*(subscription.drain(closer) for subscription in self._subscriptions))
        self._subscriptions.clear()
        self._closing = True
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        await self._link.close()
        self._up.set()

    def _current(self) -> Link:
        """The link. Raises Disconnected without one, BusLost if there will never be one again."""
        if self._failure is not None:
            raise BusLost(f"the message bus cannot reconnect: {self._failure!r}") from self._failure
        if self._closing:
            raise Disconnected("the message bus was closed")
        if not self._link.alive:
            raise Disconnected()
        return self._link

    def _checked(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> Link:
        check_subject(subject)
        # The server closes a connection that sends more than this, so it is never tried.
        size = len(data) + headers_bytes(headers)
        link = self._current()
        if size > link.client.max_payload:
            raise MessageTooLarge(subject, size, link.client.max_payload)
        return link

    async def _keep_connected(self) -> None:
        while True:
            await self._link.end()
            self._up.clear()
            log.warning("bus_disconnected", name=self._name)
            for attempt in itertools.count():
                await asyncio.sleep(backoff_s(attempt))
                try:
                    await self._reconnect()
                    break
                except BusError as error:
                    _log_attempt("bus_unreachable", attempt, error=error.message)
            self._reconnects += 1
            self._up.set()
            log.info("bus_reconnected", reconnects=self._reconnects)

    async def _reconnect(self) -> None:
        link = await Link.open(self._url, name=self._name)
        try:
            for subscription in list(self._subscriptions):
                await subscription.attach(link)
            self._link = link  # from here on handlers can answer what the new subscriptions bring
            await link.barrier("reconnect", SUBSCRIBE_TIMEOUT_S)
        except BaseException as error:
            await link.close()
            if isinstance(error, errors.Error | OSError):
                raise link.translated(error) from error
            raise

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and keeper.exception() is not None:
            self._failure = keeper.exception()
            log.error("bus_failed", error=str(self._failure), exc_info=self._failure)
            self._up.set()


def _log_attempt(event: str, attempt: int, **fields: object) -> None:
    """Warn at attempts 0, 1, 3, 7, …: an outage must show, and must not flood the log."""
    if attempt & (attempt + 1) == 0:
        log.warning(event, attempt=attempt + 1, **fields)


def _message(message: Msg) -> Message:
    return Message(message.subject, message.data, dict(message.headers or {}), message.reply)

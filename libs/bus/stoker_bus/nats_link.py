"""One connection to a NATS server, from its opening to its end.

nats-py can reconnect by itself, but then it sends what was waiting when the link broke (late), lets calls
in flight run into their timeouts, and closes for good on most protocol errors. So a link never reconnects:
the bus opens the next one and subscribes anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from nats import errors
from nats.aio.client import Client

from stoker_core.errors import BusError, BusRefused, Disconnected, NoResponders, RequestTimeout
from stoker_core.logging import get_logger

log = get_logger("bus")

CONNECT_TIMEOUT_S = 2
PING_INTERVAL_S = 1
PINGS_MISSED_MAX = 2
UNSENT_BYTES_MAX = 2 * 1024 * 1024
"""Beyond this many bytes not yet handed to the kernel, publishers wait."""
FLUSH_TIMEOUT_S = 2.0
END_POLL_S = 0.25
CLOSE_TIMEOUT_S = 3.0


class Link:
    def __init__(self, url: str, name: str) -> None:
        self.client = Client()
        self.stream_ready = False  # the event stream was seen on this connection
        self._url = url
        self._name = name
        self._opening = True
        self._ended = asyncio.Event()
        self._calls: set[asyncio.Timeout] = set()

    @classmethod
    async def open(cls, url: str, *, name: str) -> Link:
        """Connect once. Raises Disconnected, or BusRefused if the credentials are not accepted."""
        link = cls(url, name)
        try:
            await link._connect()
        except (OSError, TimeoutError, errors.Error, ValueError) as error:
            await link.close()
            if "authorization" in str(error).lower():
                raise BusRefused(f"the message bus at {link._where} refused the credentials") from error
            reason = str(error) or type(error).__name__
            raise Disconnected(f"no connection to the message bus at {link._where}: {reason}") from error
        except BaseException:
            await link.close()
            raise
        return link

    @property
    def alive(self) -> bool:
        return not self._ended.is_set() and self.client.is_connected

    async def end(self) -> None:
        """Return once the connection is lost or closed; calls in flight raise Disconnected."""
        # The callback is missing when closing fails half-way inside nats-py, so the state is polled as well.
        while not self._ended.is_set() and not self.client.is_closed:
            try:
                async with asyncio.timeout(END_POLL_S):
                    await self._ended.wait()
            except TimeoutError:
                pass
        await self._on_closed()

    async def close(self) -> None:
        """Send what waits, then disconnect; at most CLOSE_TIMEOUT_S, since a frozen server takes nothing."""
        self._opening = False
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if self.alive:
                    await self.client.flush()
                await self.client.close()
        except (OSError, TimeoutError, errors.Error) as error:
            log.warning("bus_close_failed", error=str(error) or type(error).__name__)
        await self._on_closed()

    async def barrier(self, subject: str, timeout_s: float) -> None:
        """Return once the server has processed everything sent before. Raises as `call` does."""
        async with self.call(subject, timeout_s) as client:
            # Shielded: nats-py stops reading for good when the answer to a cancelled flush arrives.
            flush = asyncio.ensure_future(client.flush())
            flush.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(flush)

    @asynccontextmanager
    async def call(self, subject: str, timeout_s: float) -> AsyncIterator[Client]:
        """A budget for one exchange with the server. Raises Disconnected as soon as the link is lost,
        RequestTimeout after `timeout_s`, NoResponders, and BusError for anything else NATS answers.
        """
        if not self.alive:
            raise Disconnected()
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        scope = asyncio.timeout(timeout_s)
        self._calls.add(scope)
        try:
            async with scope:
                yield self.client
            if task.cancelling() > cancels:
                raise asyncio.CancelledError  # nats-py and 3.11's wait_for may swallow it
        except TimeoutError as error:
            if not self.alive:
                raise Disconnected() from error
            raise RequestTimeout(subject, timeout_s) from error
        except errors.NoRespondersError as error:
            raise NoResponders(subject) from error
        except (errors.Error, OSError) as error:
            raise self.translated(error) from error
        finally:
            self._calls.discard(scope)

    def translated(self, error: Exception) -> BusError:
        """What an error of nats-py means to callers of the bus."""
        if isinstance(error, errors.ConnectionClosedError | errors.ConnectionDrainingError | OSError):
            return Disconnected()
        return BusError(str(error)) if self.alive else Disconnected()

    async def _connect(self) -> None:
        await self.client.connect(
            self._url,
            name=self._name,
            allow_reconnect=False,
            connect_timeout=CONNECT_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=PINGS_MISSED_MAX,
            pending_size=UNSENT_BYTES_MAX,
            flush_timeout=FLUSH_TIMEOUT_S,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
        )
        self._opening = False

    async def _on_error(self, error: Exception) -> None:
        if self._opening:
            raise error  # else nats-py would try the same server again, 60 times
        if not isinstance(error, errors.UnexpectedEOF):
            log.warning("bus_error", error=str(error), kind=type(error).__name__)

    async def _on_closed(self) -> None:
        self._ended.set()
        now = asyncio.get_running_loop().time()
        for scope in self._calls:
            if not scope.expired():
                scope.reschedule(now)

    @property
    def _where(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.hostname}:{parts.port or 4222}"

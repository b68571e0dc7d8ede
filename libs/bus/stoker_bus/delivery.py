"""From a subscription to its handler: bounded waiting, a fixed number of handlers at once."""

from __future__ import annotations

import asyncio
from typing import Any

from stoker_bus.port import Handler, Message
from stoker_core.logging import get_logger

log = get_logger("bus")


class Delivery:
    """Calls a handler for each message offered, in order, `concurrency` at a time.

    At most `pending_max` messages wait; further ones are dropped and counted. Needs a running event loop.
    """

    def __init__(self, subject: str, handler: Handler, *, pending_max: int, concurrency: int) -> None:
        if pending_max < 1 or concurrency < 1:
            raise ValueError("pending_max and concurrency are at least 1")
        self.subject = subject
        self.dropped = 0
        self._handler = handler
        self._pending_max = pending_max
        # Bounded by `offer`, not by the queue: the end marks must always fit.
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue()
        self._stopped = False
        self._workers = [
            asyncio.create_task(self._work(), name=f"bus {subject} {number}") for number in range(concurrency)
        ]

    def offer(self, message: Message) -> None:
        """Take one message, or drop it if too many wait or the subscription was stopped."""
        if self._stopped:
            return
        if self._waiting.qsize() >= self._pending_max:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, …: a flood must not flood the log too
                log.warning("messages_dropped", subject=self.subject, dropped=self.dropped, waiting=self._pending_max)
            return
        self._waiting.put_nowait(message)

    def stop(self) -> None:
        """Start no further handler; what waits is discarded."""
        if self._stopped:
            return
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._end()

    async def drain(self, timeout_s: float, *, closer: asyncio.Task[Any] | None) -> None:
        """Take nothing more, handle what waits, then end; handlers that outlast `timeout_s` are cancelled.

        closer: the task that closes the bus. It may be a handler, and cannot wait for itself.
        """
        if not self._stopped:
            self._end()
        others = [worker for worker in self._workers if worker is not closer]
        if not others:
            return
        _, late = await asyncio.wait(others, timeout=timeout_s)
        if late:
            log.warning("handlers_cancelled", subject=self.subject, handlers=len(late), timeout_s=timeout_s)
            for worker in late:
                worker.cancel()
            await asyncio.wait(late)

    def _end(self) -> None:
        self._stopped = True
        for _ in self._workers:
            self._waiting.put_nowait(None)

    async def _work(self) -> None:
        while (message := await self._waiting.get()) is not None:
            try:
                await self._handler(message)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # The handler awaited something that others cancelled: that message is lost, not the subscription.
                log.error("handler_failed", subject=message.subject, error="cancelled", kind="CancelledError")
            except Exception as error:
                log.error(
                    "handler_failed",
                    subject=message.subject,
                    error=str(error),
                    kind=type(error).__name__,
                    exc_info=error,
                )

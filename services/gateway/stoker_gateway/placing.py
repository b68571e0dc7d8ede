"""From a prepared request to an instance that admitted it: queue, offer, queue again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stoker_bus.port import Bus, ask, send
from stoker_contracts import subjects
from stoker_contracts.codec import pack_tokens
from stoker_contracts.inference import Accepted, Generate, GenerateReply, RefusedReason, Sampling
from stoker_contracts.models import ModelSpec
from stoker_core.clock import Clock
from stoker_core.errors import BusError, Disconnected, EngineFailed, NoCapacity
from stoker_core.logging import get_logger
from stoker_gateway.demand import DemandBook
from stoker_gateway.queues import Dispatcher, Ticket
from stoker_gateway.routes import Route
from stoker_gateway.session import Session
from stoker_gateway.streams import Stream, Streams

log = get_logger("placing")


@dataclass(frozen=True)
class Job:
    """A request as tokens, ready for an instance."""

    request_id: str
    spec: ModelSpec
    prompt: Sequence[int]
    sampling: Sampling


class Placing:
    def __init__(
        self,
        bus: Bus,
        gateway_id: str,
        dispatcher: Dispatcher,
        streams: Streams,
        clock: Clock,
        *,
        cache_salt: str,
        generate_timeout_s: float,
        stream_buffer_tokens_max: int,
        on_cold: Callable[[str], None],
    ) -> None:
        """on_cold: told the name of a model for which a request finds no ready instance."""
        self._bus = bus
        self._gateway_id = gateway_id
        self._dispatcher = dispatcher
        self._streams = streams
        self._clock = clock
        self._cache_salt = cache_salt
        self._generate_timeout_s = generate_timeout_s
        self._stream_buffer_tokens_max = stream_buffer_tokens_max
        self._on_cold = on_cold

    async def place(self, job: Job) -> Stream:
        """Wait until an instance admits `job`; the caller closes the stream.

        Raises Overloaded (queue full), NoCapacity (none within the model's wait_s), ModelNotFound (deleted meanwhile),
        EngineFailed (an instance cannot serve it).
        """
        spec = job.spec
        ticket = self._dispatcher.queues.join(spec, self._clock.monotonic_s())
        self._dispatcher.wake(spec.model_id)
        if not self._dispatcher.routes.ready(spec.model_id):
            self._on_cold(spec.name)
        session = Session(job.request_id, tokens_max=job.sampling.max_tokens, buffer_max=self._stream_buffer_tokens_max)
        stream = self._streams.open(session, spec.model_id)
        try:
            async with asyncio.timeout(spec.wait_s):
                while not await self._offer(job, stream, await self._granted(ticket)):
                    self._dispatcher.queues.rejoin(ticket)
                    self._dispatcher.wake(spec.model_id)
            return stream
        except BaseException as error:
            await self._streams.close(stream)
            if isinstance(error, TimeoutError):
                waited_ms = int((self._clock.monotonic_s() - ticket.joined_s) * 1000)
                reason = self._dispatcher.routes.failures.get(spec.model_id, "")
                raise NoCapacity(spec.name, waited_ms, reason) from None
            raise
        finally:
            self._dispatcher.leave(ticket)

    async def tell_demand(self, book: DemandBook) -> None:
        """Tell the leader what is wanted, for ever."""
        changed = self._dispatcher.changed
        while True:
            changed.clear()
            for demand in book.due(self._clock.monotonic_s()):
                # Without a link nobody can be told; the repeat comes soon, and an end lapses by itself.
                with contextlib.suppress(Disconnected):
                    await send(self._bus, subjects.SCHEDULER_DEMAND, demand)
            now_s = self._clock.monotonic_s()
            next_s = book.next_s(now_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if next_s is None else max(next_s - now_s, 0.001)):
                    await changed.wait()

    async def _granted(self, ticket: Ticket) -> Route:
        try:
            return await ticket.granted
        except asyncio.CancelledError:
            granted = ticket.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._dispatcher.routes.withdrawn(granted.result())
                self._dispatcher.wake(ticket.spec.model_id)
            raise

    async def _offer(self, job: Job, stream: Stream, route: Route) -> bool:
        """Ask one instance. False: it did not admit the request, which may be offered elsewhere."""
        session, routes = stream.session, self._dispatcher.routes
        message = Generate(
            request_id=job.request_id,
            attempt=session.begin(route.node, route.instance_id),
            gateway_id=self._gateway_id,
            prompt=pack_tokens(job.prompt),
            sampling=job.sampling,
            generated=session.generated,
            cache_salt=self._cache_salt,
        )
        subject = subjects.instance_generate(route.node, route.instance_id)
        reply: GenerateReply
        try:
            reply = await ask(self._bus, subject, message, GenerateReply, timeout_s=self._generate_timeout_s)
        except BusError as error:
            if session.journal or session.ended:  # its frames came, so it did admit the request
                reply = Accepted(room=route.room)
            else:
                routes.refused(route)
                log.info("offer_unanswered", request=job.request_id, instance=route.instance_id, code=error.code)
                session.abandon()  # it may have admitted the request after all
                await self._streams.cancel(route.node, route.instance_id, job.request_id, message.attempt)
                return False
        except BaseException:
            routes.withdrawn(route)
            try:
                await self._streams.cancel(route.node, route.instance_id, job.request_id, message.attempt)
            finally:
                self._dispatcher.wake(job.spec.model_id)
            raise
        if isinstance(reply, Accepted):
            routes.accepted(route, reply.room)
            self._streams.accepted(stream)
            return True
        busy, stopping = reply.reason is RefusedReason.BUSY, reply.reason is RefusedReason.STOPPING
        retry_s = self._clock.monotonic_s() + reply.retry_after_ms / 1000 if busy and reply.retry_after_ms else 0.0
        routes.refused(route, stopping=stopping, retry_s=retry_s)
        log.info("offer_refused", request=job.request_id, instance=route.instance_id, reason=reply.reason)
        if reply.reason is RefusedReason.UNSUPPORTED:
            raise EngineFailed(reply.message or "the instance cannot serve this request")
        return False

"""Requests that wait for an instance: one bounded queue a model, first come first served. No I/O."""

from __future__ import annotations

import asyncio
from bisect import insort
from dataclasses import dataclass, field

from stoker_contracts.models import ModelSpec
from stoker_core.errors import Overloaded, StokerError
from stoker_gateway.routes import Route, Routes

RETRY_AFTER_MS = 1000


@dataclass(order=True)
class Ticket:
    """A place in the queue. granted: the instance to ask, or the reason why there will be none."""

    number: int
    spec: ModelSpec = field(compare=False)
    joined_s: float = field(compare=False)
    granted: asyncio.Future[Route] = field(compare=False)


class Queues:
    def __init__(self) -> None:
        self._waiting: dict[str, list[Ticket]] = {}
        self._joined = 0

    def join(self, spec: ModelSpec, now_s: float) -> Ticket:
        """A ticket at the end of the model's queue. Raises Overloaded if it is full."""
        if self.depth(spec.model_id) >= spec.queue_max:
            raise Overloaded(f"the queue of {spec.name!r}", RETRY_AFTER_MS)
        self._joined += 1
        ticket = Ticket(self._joined, spec, now_s, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(spec.model_id, []).append(ticket)
        return ticket

    def rejoin(self, ticket: Ticket) -> None:
        """Back to where its number belongs: before all that came later."""
        ticket.granted = asyncio.get_running_loop().create_future()
        insort(self._waiting.setdefault(ticket.spec.model_id, []), ticket)

    def leave(self, ticket: Ticket) -> None:
        """Out of the queue, if it is in it."""
        queue = self._waiting.get(ticket.spec.model_id, [])
        if ticket in queue:
            queue.remove(ticket)
        if not queue:
            self._waiting.pop(ticket.spec.model_id, None)

    def first(self, model_id: str) -> Ticket | None:
        # A request that was cancelled this very moment is still listed, with its future cancelled.
        return next((t for t in self._waiting.get(model_id, ()) if not t.granted.done()), None)

    def grant(self, ticket: Ticket, route: Route) -> None:
        self.leave(ticket)
        ticket.granted.set_result(route)

    def refuse_all(self, model_id: str, error: StokerError) -> None:
        """End the waiting of every request for a model."""
        for ticket in self._waiting.pop(model_id, []):
            if not ticket.granted.done():
                ticket.granted.set_exception(error)

    def depth(self, model_id: str) -> int:
        return len(self._waiting.get(model_id, ()))

    def oldest_s(self, model_id: str, now_s: float) -> float:
        ticket = self.first(model_id)
        return now_s - ticket.joined_s if ticket else 0.0

    def models(self) -> list[str]:
        return sorted(self._waiting)


class Dispatcher:
    """Brings the first in a queue and room at an instance together, whenever either appears. Never polls."""

    def __init__(self, queues: Queues, routes: Routes) -> None:
        self.queues = queues
        self.routes = routes
        self.changed = asyncio.Event()  # some queue may have begun, shrunk or ended

    def wake(self, model_id: str) -> None:
        """Grant what can be granted now. Called on news of room and of requests."""
        if not self.queues.depth(model_id):
            return
        while (ticket := self.queues.first(model_id)) and (
            route := self.routes.reserve(model_id, slots=ticket.spec.slots)
        ):
            self.queues.grant(ticket, route)
        self.changed.set()

    def reopen(self, now_s: float) -> None:
        """Try again where instances said when to."""
        if models := self.queues.models():
            self.routes.reopen(now_s)
            for model_id in models:
                self.wake(model_id)

    def leave(self, ticket: Ticket) -> None:
        self.queues.leave(ticket)
        self.changed.set()

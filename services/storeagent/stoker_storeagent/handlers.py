"""Subjects that the storage agent answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from stoker_bus.port import Bus, Message, answer
from stoker_contracts import subjects
from stoker_contracts.codec import Contract, decode
from stoker_contracts.control import (
    CancelPrefetch,
    Done,
    EvictModel,
    Failed,
    Locate,
    PrefetchModel,
    RegisterModel,
)
from stoker_contracts.models import Tier
from stoker_core.errors import InvalidRequest, NotHeld, StaleTerm, StokerError
from stoker_core.logging import get_logger
from stoker_core.tracing import span
from stoker_storeagent.ports import Served, Tiers
from stoker_storeagent.prefetch import Prefetcher
from stoker_storeagent.register import Registrar

log = get_logger("handlers")

REGISTER_CONCURRENCY = 2
LOCATE_CONCURRENCY = 16
BUSY = "busy"


class Handlers:
    """Orders of a leader are obeyed in the highest term that was seen; a lower one is a leader's who leads no more."""

    def __init__(
        self, bus: Bus, registrar: Registrar, prefetcher: Prefetcher, tiers: Tiers, served: Served, *, node: str
    ) -> None:
        self._bus, self._registrar, self._prefetcher = bus, registrar, prefetcher
        self._tiers, self._served, self._node = tiers, served, node
        self._term = 0

    async def subscribed(self, stack: AsyncExitStack) -> None:
        """Answer until the stack is closed."""
        node = self._node
        for subject, handler, concurrency in (
            (subjects.store_register(node), self.register, REGISTER_CONCURRENCY),
            (subjects.store_prefetch(node), self.prefetch, 1),
            (subjects.store_cancel(node), self.cancel, 1),
            (subjects.store_evict(node), self.evict, 1),
            (subjects.store_locate(node), self.locate, LOCATE_CONCURRENCY),
        ):
            subscription = await self._bus.subscribe(subject, handler, concurrency=concurrency)
            stack.push_async_callback(subscription.stop)

    async def register(self, message: Message) -> None:
        """`store.<node>.register`: answered Registered or Failed."""
        await self._answered(message, lambda: self._registrar.register(decode(RegisterModel, message.data)))

    async def prefetch(self, message: Message) -> None:
        """`store.<node>.prefetch`: answered Done or Failed."""

        async def work() -> Contract:
            order: PrefetchModel = decode(PrefetchModel, message.data)
            self._fence(order.term)
            self._prefetcher.order(order)
            return Done()

        await self._answered(message, work)

    async def cancel(self, message: Message) -> None:
        """`store.<node>.cancel`: answered Done or Failed."""

        async def work() -> Contract:
            order: CancelPrefetch = decode(CancelPrefetch, message.data)
            self._fence(order.term)
            self._prefetcher.cancel(order.model_id)
            return Done()

        await self._answered(message, work)

    async def evict(self, message: Message) -> None:
        """`store.<node>.evict`: answered Done or Failed."""

        async def work() -> Contract:
            order: EvictModel = decode(EvictModel, message.data)
            self._fence(order.term)
            if order.tier not in (Tier.SSD, Tier.DRAM):
                raise InvalidRequest(f"tier: nothing is evicted from {order.tier}", "tier")
            if await self._tiers.drop(order.model_id, "ordered", tier=order.tier):
                return Done()
            return Failed(code=BUSY, message=f"{order.model_id} is in use", retryable=True)

        await self._answered(message, work)

    async def locate(self, message: Message) -> None:
        """`store.<node>.locate`: answered Located or Failed."""

        async def work() -> Contract:
            question: Locate = decode(Locate, message.data)
            located = self._served.located(question.model_id)
            if located is None:
                raise NotHeld(f"nothing of {question.model_id} is here")
            return located

        await self._answered(message, work)

    def _fence(self, term: int) -> None:
        if term < self._term:
            raise StaleTerm(term, self._term)
        self._term = term

    async def _answered(self, message: Message, work: Callable[[], Awaitable[Contract]]) -> None:
        subject = message.subject.rpartition(".")[2]
        with span(f"store.{subject}", headers=message.headers):
            reply: Contract
            try:
                reply = await work()
            except StokerError as error:
                if not isinstance(error, NotHeld):
                    log.warning("order_refused", order=subject, code=error.code, error=error.message)
                # A message may quote file names, which need not be valid text.
                text = error.message.encode("utf-8", "backslashreplace").decode()
                reply = Failed(code=error.code, message=text, retryable=error.retryable)
            await answer(self._bus, message, reply)

"""Bring models to nodes before anybody waits for them: who takes them from whom, and the orders for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from stoker_bus.port import Bus, Message, Subscription, answer
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import Done, Failed, StoreStatus, WantPrefetch
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import InvalidRequest, ModelNotFound, NoNode, Overloaded, StokerError, Stopping
from stoker_core.logging import get_logger
from stoker_policy import plan_fanout
from stoker_scheduler.order_kinds import PrefetchOrder
from stoker_scheduler.orders import Orders
from stoker_scheduler.state import State

log = get_logger("prefetch")

TIERS = frozenset({Tier.SSD, Tier.DRAM})
RETRY_AFTER_MS = 1000


class Prefetches:
    """Answers `scheduler.prefetch`. refresh: reads the models again, for one that was registered a moment ago."""

    def __init__(
        self, state: State, orders: Orders, clock: Clock, refresh: Callable[[], Awaitable[None]], *, live_s: float
    ) -> None:
        """live_s: how long a storage agent counts as live after it was heard."""
        self._state, self._orders, self._clock, self._refresh = state, orders, clock, refresh
        self._live_s = live_s
        self.closing = False

    async def subscribe(self, bus: Bus) -> Subscription:
        async def on_want(message: Message) -> None:
            reply: Done | Failed = Done()
            try:
                await self.order(decode(WantPrefetch, message.data))
            except StokerError as error:
                reply = Failed(code=error.code, message=error.message, retryable=error.retryable)
                log.warning("prefetch_refused", code=error.code, reason=error.message)
            await answer(bus, message, reply)

        return await bus.subscribe(subjects.SCHEDULER_PREFETCH, on_want)

    async def order(self, want: WantPrefetch) -> None:
        """Give an order to every node that is meant, or to none.

        Raises ModelNotFound, NoNode if one that is named, or any at all, is not live, InvalidRequest for a tier that nothing
        is brought to, Overloaded, Stopping, DatabaseUnavailable.
        """
        if want.tier not in TIERS:
            raise InvalidRequest(f"models are brought to {' or '.join(sorted(TIERS))}, not to {want.tier}", "tier")
        if want.model_id not in self._state.models:
            await self._refresh()
            if want.model_id not in self._state.models:
                raise ModelNotFound(want.model_id)
        if self.closing:
            raise Stopping
        live = {status.node: status for status in self._state.live_stores(self._clock.monotonic_s(), self._live_s)}
        nodes = tuple(dict.fromkeys(want.nodes)) or tuple(live)
        if gone := [node for node in nodes if node not in live]:
            raise NoNode(f"no storage agent is live on {', '.join(gone)}")
        if not nodes:
            raise NoNode("no storage agent is live")
        if self._orders.room < len(nodes):
            raise Overloaded("the scheduler's queue of commands", RETRY_AFTER_MS)
        plan = {} if want.cancel else self._plan(want.model_id, nodes, live)
        for node in nodes:
            sources = plan.get(node, ())
            self._orders.give(PrefetchOrder(node, want, sources, self._clock.monotonic_s()))
            log.info(
                "decided",
                command="cancel" if want.cancel else "prefetch",
                node=node,
                model_id=want.model_id,
                tier=want.tier,
                sources=sources,
            )

    def _plan(self, model_id: str, nodes: tuple[str, ...], live: dict[str, StoreStatus]) -> dict[str, tuple[str, ...]]:
        """Among those who serve peers at all."""
        peers = {node: status for node, status in live.items() if status.address}
        holders = [node for node, status in peers.items() if _holds(status, model_id)]
        links = {(node, link.peer): link.read_bytes_per_s for node, status in peers.items() for link in status.links}
        return plan_fanout(holders, [node for node in nodes if node in peers], links)


def _holds(status: StoreStatus, model_id: str) -> bool:
    """All of it, in one tier."""
    return any(h.model_id == model_id and h.total_bytes and h.held_bytes >= h.total_bytes for h in status.held)

"""Empty nodes: store that they are to be empty, have their workers refuse starts, and stop what idles there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from stoker_bus.events import EventPublisher
from stoker_bus.port import Bus, Message, Subscription, answer
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import Done, Failed, WantDrain
from stoker_contracts.events import NODE_DRAINED, NODE_DRAINING, NODE_UNDRAINED
from stoker_contracts.models import InstanceState
from stoker_core.clock import Clock
from stoker_core.errors import NoNode, StaleTerm, StokerError, Stopping
from stoker_core.logging import get_logger
from stoker_db.ports import DrainRow, Nodes
from stoker_policy import Stop
from stoker_policy.backoff import backoff_ms
from stoker_scheduler.order_kinds import DrainOrder
from stoker_scheduler.orders import Orders
from stoker_scheduler.records import Node, Tracked
from stoker_scheduler.state import State

log = get_logger("drain")


class Drains:
    """Answers `scheduler.drain`; `turn` compares what is wanted of each node with what its worker says, and acts.

    stop: gives the order to stop an instance.  wake: set when a turn should come at once.
    """

    def __init__(
        self,
        state: State,
        nodes: Nodes,
        orders: Orders,
        events: EventPublisher,
        clock: Clock,
        *,
        stop: Callable[[Stop, float], None],
        wake: asyncio.Event,
    ) -> None:
        self._state, self._nodes, self._orders = state, nodes, orders
        self._events, self._clock, self._stop, self._wake = events, clock, stop, wake
        self._writing = asyncio.Lock()  # a drain that ends must not be written over one that was undone meanwhile
        self.closing = False

    async def begin(self) -> None:
        """Read which nodes are to be empty. Raises DatabaseUnavailable."""
        for row in await self._nodes.drains():
            self._state.set_drain(row.node, row)

    async def subscribe(self, bus: Bus) -> Subscription:
        async def on_want(message: Message) -> None:
            reply: Done | Failed = Done()
            try:
                await self.want(decode(WantDrain, message.data))
            except StokerError as error:
                reply = Failed(code=error.code, message=error.message, retryable=error.retryable)
                log.warning("drain_refused", code=error.code, reason=error.message)
            await answer(bus, message, reply)

        return await bus.subscribe(subjects.SCHEDULER_DRAIN, on_want)

    async def want(self, want: WantDrain) -> None:
        """Store how a node shall be, from which all else follows. Raises NoNode, Stopping, DatabaseUnavailable."""
        if self.closing:
            raise Stopping
        node = self._state.nodes.get(want.node)
        if node is None:
            raise NoNode(f"no node is called {want.node!r}")
        try:
            async with self._writing:
                if want.undo:
                    await self._undo(node)
                elif node.drain is None:
                    await self._drain(node)
        except StaleTerm as stale:
            self._state.superseded_by = stale.highest
            raise Stopping("this scheduler leads no more; ask again") from stale
        self._wake.set()

    async def turn(self) -> None:
        """Raises StaleTerm, DatabaseUnavailable."""
        if self.closing or self._state.superseded_by is not None:
            return
        for node in sorted(self._state.nodes.values(), key=lambda node: node.name):
            if node.status is None or not node.answered or node.silent:
                continue
            self._tell(node)
            if node.drain is not None:
                await self._empty(node)

    def _tell(self, node: Node) -> None:
        """Until its status says so: commands get lost, and a new boot knows nothing of it."""
        order = DrainOrder(node.name, node.boot_id, node.drain is not None)
        told = node.status is None or node.status.leaving or node.status.draining == order.draining
        if not told and not self._orders.full and not self._orders.in_hand(order.key):
            self._orders.give(order)

    async def _empty(self, node: Node) -> None:
        now_s = self._clock.monotonic_s()
        there = [t for t in self._state.instances.values() if t.row.node == node.name and not t.ended]
        for command in stops(there, now_s):
            if self._orders.full:
                return
            self._stop(command, now_s)
        if there or node.status is None or not node.status.draining:
            return
        async with self._writing:
            if node.drain is None or node.drain.drained:
                return
            done = replace(node.drain, term=self._state.term, drained=True)
            await self._nodes.drain(done)
            self._state.set_drain(node.name, done)
        self._events.emit(NODE_DRAINED, node.name, term=self._state.term)
        log.info("node_drained", node=node.name)

    async def _drain(self, node: Node) -> None:
        row = DrainRow(node=node.name, term=self._state.term)
        await self._nodes.drain(row)
        self._state.set_drain(node.name, row)
        left = sum(t.row.node == node.name and not t.ended for t in self._state.instances.values())
        self._events.emit(NODE_DRAINING, node.name, term=row.term, instances=left)
        log.info("node_draining", node=node.name, instances=left)

    async def _undo(self, node: Node) -> None:
        undone = await self._nodes.undrain(node.name, term=self._state.term)
        self._state.set_drain(node.name, None)
        if undone:
            self._events.emit(NODE_UNDRAINED, node.name, term=self._state.term)
            log.info("node_undrained", node=node.name)


def stops(there: Iterable[Tracked], now_s: float) -> list[Stop]:
    """What of a drained node's instances ends now, by id: those without a request in hand.

    One that still starts ends too: its requests go elsewhere. Who was asked and is still there is asked again, after 2, 4, 8 … s.
    """
    found = []
    for tracked in sorted(there, key=lambda tracked: tracked.row.instance_id):
        if tracked.status is None or tracked.status.running > 0 or tracked.state is InstanceState.STOPPING:
            continue
        asked_s = tracked.stop_asked_s
        if asked_s is not None and (now_s - asked_s) * 1000 < backoff_ms(tracked.stops):
            continue
        ready = tracked.state is InstanceState.READY
        found.append(Stop(instance_id=tracked.row.instance_id, reason="its node is drained", only_if_idle=ready))
    return found

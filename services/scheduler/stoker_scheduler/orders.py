"""Carry out decisions: desired state in Postgres first, then the command, bounded and side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from stoker_bus.events import EventPublisher
from stoker_bus.port import Bus, ask
from stoker_contracts import subjects
from stoker_contracts.codec import Contract
from stoker_contracts.control import (
    CancelPrefetch,
    CommandReply,
    Done,
    DrainNode,
    Failed,
    PrefetchModel,
    PrepareModel,
    StartInstance,
    StopInstance,
)
from stoker_contracts.events import INSTANCE_PLACED
from stoker_contracts.models import InstanceState
from stoker_core.clock import Clock
from stoker_core.errors import (
    BusError,
    DatabaseUnavailable,
    Disconnected,
    InvalidMessage,
    NoResponders,
    RequestTimeout,
    StaleTerm,
    StokerError,
    Stopping,
)
from stoker_core.logging import get_logger
from stoker_db.ports import InstanceRow, Instances
from stoker_scheduler.order_kinds import DrainOrder, Order, PrefetchOrder, PrepareOrder, StartOrder, StopOrder
from stoker_scheduler.state import State

log = get_logger("orders")

WAITING_MAX = 256
TRIES = 2
WRONG_BOOT = "wrong_boot"
BUSY = "busy"

NODES_FAULT = frozenset(
    {WRONG_BOOT, Stopping.code, NoResponders.code, RequestTimeout.code, Disconnected.code, InvalidMessage.code}
)
"""Answers that say nothing of the model. Nothing more goes to that node until it is heard again."""


class Orders:
    """A bounded queue of orders, worked on by `at_once` tasks. changed: set when an order changed the state."""

    def __init__(
        self,
        state: State,
        bus: Bus,
        instances: Instances,
        events: EventPublisher,
        clock: Clock,
        changed: asyncio.Event,
        *,
        at_once: int,
        timeout_s: float,
        start_budget_s: float,
    ) -> None:
        self._state, self._bus, self._instances, self._events = state, bus, instances, events
        self._clock, self._changed = clock, changed
        self._at_once, self._timeout_s, self._start_budget_s = at_once, timeout_s, start_budget_s
        self._waiting: asyncio.Queue[Order] = asyncio.Queue(WAITING_MAX)
        self._in_hand: set[str] = set()
        self._wanted: dict[tuple[str, str], PrefetchOrder] = {}

    @property
    def full(self) -> bool:
        return self._waiting.full()

    @property
    def room(self) -> int:
        """How many more orders may be given."""
        return WAITING_MAX - self._waiting.qsize()

    def in_hand(self, key: str) -> bool:
        """Whether an order for this instance, or with this key, waits or is being carried out."""
        return key in self._in_hand

    def give(self, order: Order) -> None:
        """Queue an order. Raises asyncio.QueueFull: ask `full` first."""
        self._waiting.put_nowait(order)
        match order:
            case StartOrder() | StopOrder():
                self._in_hand.add(order.row.instance_id)
            case DrainOrder():
                self._in_hand.add(order.key)
            case PrefetchOrder():
                self._wanted[order.key] = order

    async def run(self) -> None:
        """Carry orders out until cancelled. Raises a group of StaleTerm, BusLost."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._at_once):
                group.create_task(self._work(), name=f"orders-{number}")

    async def drain(self) -> None:
        await self._waiting.join()

    async def _work(self) -> None:
        while True:
            order = await self._waiting.get()
            try:
                await self._carry_out(order)
            finally:
                match order:
                    case StartOrder() | StopOrder():
                        self._in_hand.discard(order.row.instance_id)
                    case DrainOrder():
                        self._in_hand.discard(order.key)
                    case PrefetchOrder() if self._newest(order):
                        del self._wanted[order.key]
                self._waiting.task_done()

    async def _carry_out(self, order: Order) -> None:
        match order:
            case StartOrder():
                await self._start(order)
            case StopOrder():
                await self._stop(order)
            case PrepareOrder():
                await self._prepare(order)
            case PrefetchOrder():
                await self._prefetch(order)
            case DrainOrder():
                await self._drain(order)

    async def _start(self, order: StartOrder) -> None:
        row = order.row
        if self._left_s(order) <= 0:  # given up already, and perhaps decided anew
            spent = Failed(code=RequestTimeout.code, message="it waited past its start budget", retryable=True)
            self._start_failed(row, spent, counts=False)
            return
        try:
            await self._desire(row)
        except DatabaseUnavailable as error:
            self._start_failed(row, Failed(code=error.code, message=error.message, retryable=True), counts=False)
            return
        command = StartInstance(
            instance_id=row.instance_id,
            boot_id=row.boot_id,
            term=self._state.term,
            model=order.model,
            devices=row.devices,
            budget_ms=max(0, round(self._left_s(order) * 1000)),
        )
        sent_s = self._clock.monotonic_s()  # from here on the worker's own phases count
        reply = await self._command(row.node, subjects.worker_start(row.node), command)
        if isinstance(reply, Failed):
            self._start_failed(row, reply, counts=reply.code not in NODES_FAULT)
            return
        placed = {
            "model": order.model.name,
            "node": row.node,
            "devices": list(row.devices),
            "reason": row.reason,
            "term": self._state.term,
            "place_ms": round((sent_s - order.demanded_s) * 1000, 1),
        }
        self._events.emit(INSTANCE_PLACED, row.instance_id, **placed)
        log.info("instance_placed", instance=row.instance_id, **placed)

    def _left_s(self, order: StartOrder) -> float:
        return self._start_budget_s - (self._clock.monotonic_s() - order.decided_s)

    def _start_failed(self, row: InstanceRow, failed: Failed, *, counts: bool) -> None:
        reason = f"{failed.code}: {failed.message}"
        self._state.start_failed(row.instance_id, reason, self._clock.monotonic_s(), counts=counts)
        self._changed.set()
        log.warning("start_failed", instance=row.instance_id, model_id=row.model_id, node=row.node, reason=reason)

    async def _stop(self, order: StopOrder) -> None:
        row = order.row
        try:
            await self._desire(row)
            command = StopInstance(
                instance_id=row.instance_id,
                boot_id=row.boot_id,
                term=self._state.term,
                only_if_idle=order.only_if_idle,
                reason=row.reason,
            )
            reply = await self._command(row.node, subjects.worker_stop(row.node), command)
            if isinstance(reply, Failed) and reply.code == BUSY:
                await self._desire(replace(row, desired=InstanceState.READY, reason="busy when asked to stop"))
                self._state.stop_refused(row.instance_id)
        except DatabaseUnavailable as error:
            reply = Failed(code=error.code, message=error.message, retryable=True)
        if isinstance(reply, Failed):
            log.warning("stop_failed", instance=row.instance_id, node=row.node, code=reply.code, reason=reply.message)
        self._changed.set()

    async def _prepare(self, order: PrepareOrder) -> None:
        command = PrepareModel(boot_id=order.boot_id, term=self._state.term, model=order.model)
        reply = await self._command(order.node, subjects.worker_prepare(order.node), command)
        if isinstance(reply, Failed):
            log.warning("prepare_failed", node=order.node, code=reply.code, reason=reply.message)

    async def _drain(self, order: DrainOrder) -> None:
        command = DrainNode(boot_id=order.boot_id, term=self._state.term, draining=order.draining)
        reply = await self._command(order.node, subjects.worker_drain(order.node), command)
        if isinstance(reply, Failed):
            log.warning("drain_failed", node=order.node, code=reply.code, reason=reply.message)

    async def _prefetch(self, order: PrefetchOrder) -> None:
        want, waited_ms = order.want, round((self._clock.monotonic_s() - order.ordered_s) * 1000)
        command: PrefetchModel | CancelPrefetch
        if want.cancel:
            subject = subjects.store_cancel(order.node)
            command = CancelPrefetch(model_id=want.model_id, term=self._state.term)
        else:
            subject = subjects.store_prefetch(order.node)
            command = PrefetchModel(
                model_id=want.model_id,
                tier=want.tier,
                term=self._state.term,
                priority=want.priority,
                # 0 means no limit; one that is over says so to the agent by the least there is.
                budget_ms=max(1, want.budget_ms - waited_ms) if want.budget_ms else 0,
                sources=order.sources,
            )
        # A storage agent that does not answer says nothing of its node's worker.
        reply = await self._ask(subject, command, lambda: self._newest(order))
        if isinstance(reply, Failed):
            log.warning(
                "cancel_failed" if want.cancel else "prefetch_failed",
                node=order.node,
                model_id=want.model_id,
                code=reply.code,
                reason=reply.message,
            )

    def _newest(self, order: PrefetchOrder) -> bool:
        """Whether nothing else was ordered meanwhile for the same model there; what was takes its place."""
        return self._wanted.get(order.key) is order

    async def _desire(self, row: InstanceRow) -> None:
        await self._instances.desire(row)
        self._state.desired(row)

    async def _command(self, node: str, subject: str, command: Contract) -> CommandReply:
        """As `_ask`, of a worker: nothing more goes to its node if the node is at fault."""
        reply = await self._ask(subject, command)
        if isinstance(reply, Failed) and reply.code in NODES_FAULT:
            self._state.unanswered(node)
        return reply

    async def _ask(self, subject: str, command: Contract, wanted: Callable[[], bool] = lambda: True) -> CommandReply:
        """The answer, or what kept it from coming; Done unless it is `wanted` still. Raises StaleTerm, BusLost."""
        reply: CommandReply = Done()
        for _ in range(TRIES):
            if not wanted():
                return Done()
            try:
                reply = await ask(self._bus, subject, command, CommandReply, timeout_s=self._timeout_s)
                break
            except RequestTimeout as error:
                reply = Failed(code=error.code, message=error.message, retryable=True)
            except StokerError as error:
                if isinstance(error, BusError) and not error.retryable:
                    raise
                reply = Failed(code=error.code, message=error.message, retryable=error.retryable)
                break
        if isinstance(reply, Failed) and reply.code == StaleTerm.code:
            raise StaleTerm(self._state.term)
        return reply

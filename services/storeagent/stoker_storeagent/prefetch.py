"""Models brought ahead of use: orders by priority and deadline, which give way to starts and end when nobody wants them."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import dataclass, field

from stoker_contracts.control import PrefetchModel
from stoker_contracts.events import (
    TIER_PREFETCH_CANCELLED,
    TIER_PREFETCH_DONE,
    TIER_PREFETCH_FAILED,
    TIER_PREFETCH_PROGRESS,
    TIER_PREFETCH_QUEUED,
    TIER_PREFETCH_STARTED,
)
from stoker_contracts.models import Tier
from stoker_core.clock import Clock
from stoker_core.errors import InvalidRequest, LoadCancelled, Overloaded, PoolExhausted, StokerError
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.ports import Events
from stoker_storeagent.slots import Turn
from stoker_storeagent.tiers import NodeTiers
from stoker_storeagent.transfer import Transfer

log = get_logger("prefetch")

QUEUE_MAX = 1024
AT_ONCE = 4
PROGRESS_S = 1.0
AGAIN_S = 5.0
"""Before an order that a start took the room of is tried again."""
TRIES = 24


@dataclass(eq=False)
class Wanted:
    """An order.  deadline_s: for it to begin, by the clock.  not_before_s: it gave way, and waits until then."""

    order: PrefetchModel
    number: int
    deadline_s: float
    not_before_s: float = 0.0
    tries: int = 0
    started_s: float = 0.0
    task: asyncio.Task[None] | None = None
    transfer: Transfer | None = None
    turn: Turn = field(default_factory=Turn)

    @property
    def rank(self) -> tuple[int, int, float]:
        return (1, -self.order.priority, self.deadline_s)


class Prefetcher:
    """One order per model; AT_ONCE are worked on. `part` must run."""

    def __init__(self, tiers: NodeTiers, events: Events, clock: Clock) -> None:
        self._tiers, self._events, self._clock = tiers, events, clock
        self._wanted: dict[str, Wanted] = {}
        self._numbers = itertools.count()
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> int:
        return sum(wanted.task is None for wanted in self._wanted.values())

    def order(self, order: PrefetchModel) -> None:
        """Queue it in the place of an earlier one for the same model. Raises InvalidRequest, Overloaded."""
        if order.tier not in (Tier.SSD, Tier.DRAM):
            raise InvalidRequest(f"tier: nothing is prefetched into {order.tier}", "tier")
        before = self._wanted.get(order.model_id)
        if before is None and len(self._wanted) >= QUEUE_MAX:
            raise Overloaded("the prefetch queue", retry_after_ms=1000)
        budget_s = order.budget_ms / 1000 if order.budget_ms > 0 else math.inf
        wanted = Wanted(order, next(self._numbers), self._clock.monotonic_s() + budget_s)
        wanted.turn.rank = wanted.rank
        if before is not None:
            if before.task is not None and before.order.tier is order.tier:  # a repeat: it is on its way already
                before.order, before.deadline_s = order, wanted.deadline_s
                if not before.turn.starting:  # else a start waits for it too
                    before.turn.rank = before.rank
                return
            self._drop(before, "replaced")
        self._wanted[order.model_id] = wanted
        self._say(TIER_PREFETCH_QUEUED, wanted, priority=order.priority)
        self._wake.set()

    def cancel(self, model_id: str) -> None:
        wanted = self._wanted.get(model_id)
        if wanted is not None:
            self._drop(wanted, "cancelled")

    def part(self) -> Part:
        return Part("prefetch", self._run)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                now_s = self._clock.monotonic_s()
                for wanted in list(self._wanted.values()):
                    if wanted.task is None and not wanted.tries and now_s > wanted.deadline_s:
                        self._drop(wanted, "deadline")
                running = sum(wanted.task is not None for wanted in self._wanted.values())
                due = [w for w in self._wanted.values() if w.task is None and w.not_before_s <= now_s]
                for wanted in sorted(due, key=lambda w: (w.rank, w.number))[: AT_ONCE - running]:
                    wanted.task = group.create_task(self._bring(wanted), name=f"prefetch {wanted.order.model_id}")
                await self._pause(now_s)

    async def _pause(self, now_s: float) -> None:
        """Until something changed, or an order's time comes."""
        times = [
            time_s
            for wanted in self._wanted.values()
            if wanted.task is None
            for time_s in (wanted.not_before_s, math.inf if wanted.tries else wanted.deadline_s)
            if time_s > now_s
        ]
        next_s = min(times, default=math.inf)
        try:
            async with asyncio.timeout(None if next_s == math.inf else next_s - now_s + 0.01):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _drop(self, wanted: Wanted, reason: str) -> None:
        del self._wanted[wanted.order.model_id]
        if wanted.task is not None:
            wanted.task.cancel()
        self._say(TIER_PREFETCH_CANCELLED, wanted, reason=reason)
        self._wake.set()

    async def _bring(self, wanted: Wanted) -> None:
        order = wanted.order
        if not wanted.tries:
            wanted.started_s = self._clock.monotonic_s()
            self._say(TIER_PREFETCH_STARTED, wanted)
        wanted.tries += 1
        try:
            async with asyncio.TaskGroup() as group:
                telling = group.create_task(self._tell(wanted))
                try:
                    await (self._to_pool(wanted) if order.tier is Tier.DRAM else self._to_disk(wanted))
                finally:
                    telling.cancel()
        except* (LoadCancelled, PoolExhausted) as gave_way:
            if wanted.tries >= TRIES:
                self._fail(wanted, gave_way.exceptions[0])
            elif self._wanted.get(order.model_id) is wanted:
                wanted.not_before_s = self._clock.monotonic_s() + AGAIN_S
        except* StokerError as failures:
            self._fail(wanted, failures.exceptions[0])
        else:
            self._end(wanted)
            ms = round((self._clock.monotonic_s() - wanted.started_s) * 1000)
            self._say(TIER_PREFETCH_DONE, wanted, bytes=self._total_bytes(wanted), ms=ms)
        finally:
            wanted.task = wanted.transfer = None
            self._wake.set()

    async def _to_pool(self, wanted: Wanted) -> None:
        load, _ = await self._tiers.pool.load(wanted.order.model_id, "", turn=wanted.turn, wanted=wanted.order.sources)
        wanted.transfer = load.transfer
        try:
            await load.ended.wait()
        except asyncio.CancelledError:
            await self._tiers.pool.give_up(load)
            raise
        if load.error is not None:
            raise load.error

    async def _to_disk(self, wanted: Wanted) -> None:
        def begun(transfer: Transfer) -> None:
            wanted.transfer = transfer

        await self._tiers.to_disk(wanted.order.model_id, wanted.turn, wanted.order.sources, begun)

    async def _tell(self, wanted: Wanted) -> None:
        while True:
            await self._clock.sleep(PROGRESS_S)
            if wanted.transfer is not None:
                done_bytes = wanted.transfer.arrived_bytes
                self._say(TIER_PREFETCH_PROGRESS, wanted, done_bytes=done_bytes, bytes=wanted.transfer.missing_bytes)

    def _fail(self, wanted: Wanted, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, StokerError)
        self._end(wanted)
        log.warning("prefetch_failed", model_id=wanted.order.model_id, code=error.code, error=error.message)
        self._say(TIER_PREFETCH_FAILED, wanted, code=error.code, message=error.message)

    def _end(self, wanted: Wanted) -> None:
        if self._wanted.get(wanted.order.model_id) is wanted:
            del self._wanted[wanted.order.model_id]

    def _total_bytes(self, wanted: Wanted) -> int:
        found = [h.total_bytes for h in self._tiers.held() if h.model_id == wanted.order.model_id]
        return max(found, default=0)

    def _say(self, event: tuple[str, str], wanted: Wanted, **data: object) -> None:
        order = wanted.order
        self._events.emit(event, order.model_id, model=self._tiers.name(order.model_id), tier=order.tier, **data)

"""Keep every decision, and beside it what then happened: beside the path of any start, bounded, in order."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass

import msgspec

from stoker_bus.events import EventPublisher
from stoker_contracts.decisions import (
    OPTIONS_MAX,
    DecisionRecord,
    OptionRecord,
    Outcome,
    StagePrediction,
    StartupPrediction,
)
from stoker_contracts.events import INSTANCE_MEASURED, MODEL_DECIDED
from stoker_contracts.models import InstanceState, StartPhases, Tier
from stoker_core.clock import Clock
from stoker_core.errors import DatabaseUnavailable
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_db.ports import Decisions
from stoker_policy.commands import Decision
from stoker_policy.startup import Startup
from stoker_scheduler.records import Node, Tracked

log = get_logger("explain")

WAITING_MAX = 4096
"""Writes that wait for Postgres; beyond, the oldest are given up: they are history, and no start waits for them."""
STARTS_MAX = 8192
"""Starts whose outcome is awaited; beyond, the oldest are concluded without what was predicted of them."""
REPEAT_S = 1.0
"""A decision that starts nothing is kept at most this often per model: while a model waits it is made anew all the time."""
FOREVER_S = 1e9
"""Stands for a time without end."""
NEVER_READY = frozenset({InstanceState.STARTING, InstanceState.UNKNOWN})


@dataclass(frozen=True)
class _Awaited:
    record: DecisionRecord
    decided_s: float


@dataclass(frozen=True)
class _Conclusion:
    instance_id: str
    outcome: Outcome


class Explanations:
    """What was decided and what came of it, on its way to Postgres and to people. wake: set when there is something to write."""

    def __init__(
        self, decisions: Decisions, events: EventPublisher, clock: Clock, ids: Ids, *, term: int, wake: asyncio.Event
    ) -> None:
        self._decisions, self._events, self._clock, self._ids = decisions, events, clock, ids
        self._term, self._wake = term, wake
        self._waiting: deque[DecisionRecord | _Conclusion] = deque()
        self._starts: dict[str, _Awaited] = {}  # by instance
        self._idle: dict[str, tuple[object, float]] = {}  # by model: what its last decision said that started nothing

    def decided(self, decision: Decision, model: str, *, instance_id: str = "") -> None:
        """model: its name.  instance_id: what the decision started; one that started nothing is kept if it says something new."""
        now_s = self._clock.monotonic_s()
        record = record_of(decision, self._ids.new("decision"), self._term, instance_id)
        if not instance_id:
            if not self._is_news(record, now_s):
                return
        else:
            self._idle.pop(record.model_id, None)
            self._starts[instance_id] = _Awaited(record, now_s)
            if len(self._starts) > STARTS_MAX:
                del self._starts[next(iter(self._starts))]
        self._put(record)
        option = record.option
        self._events.emit(
            MODEL_DECIDED,
            model,
            decision=record.decision_id,
            instance=instance_id,
            term=self._term,
            reason=record.reason,
            weighed=record.weighed,
            chosen=msgspec.to_builtins(option) if option else None,
        )

    def became(self, tracked: Tracked, before: InstanceState, node: Node | None) -> None:
        """An instance's state was `before` and is another now: a start that is ready, or never will be, is concluded."""
        if tracked.state is not InstanceState.READY and not tracked.ended:
            return
        instance_id = tracked.row.instance_id
        start = self._starts.pop(instance_id, None)
        if start is None and before not in NEVER_READY:
            return  # it was concluded when it became ready
        outcome = outcome_of(tracked, node, self._clock.monotonic_s(), start.decided_s if start else None)
        self._put(_Conclusion(instance_id, outcome))
        record = msgspec.structs.replace(start.record, outcome=outcome) if start else None
        if record is not None and record.error is not None and record.option is not None:
            measured = {
                "decision": record.decision_id,
                "predicted_s": round(record.option.startup.total_s, 3),
                "actual_s": round(outcome.total_s, 3),
                "error": round(record.error, 3),
                "load_error": None if record.load_error is None else round(record.load_error, 3),
            }
            self._events.emit(INSTANCE_MEASURED, instance_id, **measured)
            log.info("start_measured", instance=instance_id, model_id=record.model_id, **measured)

    async def write(self) -> None:
        """Write what waits, in order. Raises DatabaseUnavailable; what was not written is tried again."""
        while self._waiting:
            item = self._waiting[0]
            match item:
                case DecisionRecord():
                    await self._decisions.add(item)
                case _Conclusion(instance_id, outcome):
                    await self._decisions.conclude(instance_id, outcome)
            if self._waiting and self._waiting[0] is item:  # it may have been given up meanwhile
                self._waiting.popleft()

    async def drain(self) -> None:
        try:
            await self.write()
        except DatabaseUnavailable:
            log.warning("explanations_lost", count=len(self._waiting))

    def _is_news(self, record: DecisionRecord, now_s: float) -> bool:
        option = record.option
        says = (option.node, option.devices, option.how) if option else record.reason
        before = self._idle.get(record.model_id)
        if before is not None and (before[0] == says or now_s - before[1] < REPEAT_S):
            return False
        self._idle[record.model_id] = (says, now_s)
        if len(self._idle) > STARTS_MAX:
            del self._idle[next(iter(self._idle))]
        return True

    def _put(self, item: DecisionRecord | _Conclusion) -> None:
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            log.warning("explanation_dropped", waiting=WAITING_MAX)
        self._waiting.append(item)
        self._wake.set()


def record_of(decision: Decision, decision_id: str, term: int, instance_id: str) -> DecisionRecord:
    """The policy's decision as it is kept: numbers for people, rounded to microseconds."""
    options = tuple(
        OptionRecord(
            node=option.node,
            devices=option.devices,
            source=option.source,
            origin=option.origin,
            how=option.how,
            startup=_prediction(option.startup),
        )
        for option in decision.options[:OPTIONS_MAX]
    )
    return DecisionRecord(
        decision_id=decision_id,
        term=term,
        model_id=decision.model_id,
        instance_id=instance_id,
        options=options,
        weighed=decision.weighed,
        reason=decision.reason,
        chosen=decision.chosen,
    )


def outcome_of(tracked: Tracked, node: Node | None, now_s: float, decided_s: float | None) -> Outcome:
    """What became of a start. decided_s: when it was decided, by this leader's clock; None: by an earlier leader.

    Its phases are its worker's own. What lies before them, until the worker had the order, is found without a clock of the
    worker: by the age that it last reported, and when.
    """
    status = tracked.status
    phases = status.phases if status else StartPhases()
    load_s = (phases.lease_ms + phases.load_ms) / 1000
    engine_s = (phases.fork_ms + phases.engine_ms + phases.announce_ms) / 1000
    failure = ""
    if tracked.ended:
        reason = tracked.gone or (status.failure if status else "")
        failure = reason or "stopped before it was ready"
    queue_s, total_s = None, load_s + engine_s
    if decided_s is not None:
        heard_s = node.heard_s if node and node.heard_s is not None else now_s
        if failure:
            total_s = now_s - decided_s
        else:
            age_s = max(status.age_ms / 1000 if status else 0.0, phases.start_ms / 1000)
            queue_s = max(0.0, heard_s - age_s - decided_s)
            total_s += queue_s
    return Outcome(
        queue_s=None if queue_s is None else round(queue_s, 6),
        load_s=round(load_s, 6),
        engine_s=round(engine_s, 6),
        total_s=round(total_s, 6),
        source=status.load_source if status else Tier.UNKNOWN,
        origin=status.load_origin if status else "",
        failure=failure,
    )


def _prediction(startup: Startup) -> StartupPrediction:
    return StartupPrediction(
        queue_s=_number(startup.queue_s),
        room_s=_number(startup.room_s),
        load_s=_number(startup.load_s),
        engine_s=_number(startup.engine_s),
        total_s=_number(startup.total_s),
        spread=_number(startup.spread),
        stages=tuple(
            StagePrediction(name=stage.name, size_bytes=stage.size_bytes, seconds=_number(stage.seconds))
            for stage in startup.stages
        ),
    )


def _number(value: float) -> float:
    """JSON knows no infinity."""
    return round(value, 6) if math.isfinite(value) else FOREVER_S

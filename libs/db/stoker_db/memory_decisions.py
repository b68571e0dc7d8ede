"""What was decided, and what then happened: in memory."""

from __future__ import annotations

from datetime import timedelta

from msgspec.structs import replace

from stoker_contracts.decisions import DecisionRecord, Outcome
from stoker_db.memory_state import KEPT_MAX, State


class MemoryDecisions:
    """Implements stoker_db.ports.Decisions."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def add(self, record: DecisionRecord) -> None:
        self._state.check()
        decisions = self._state.decisions
        if record.decision_id not in decisions:
            decisions[record.decision_id] = replace(record, outcome=None, made_at=self._state.clock.utc())
            if record.instance_id:
                self._state.started_by[record.instance_id] = record.decision_id
            if len(decisions) > KEPT_MAX:
                self._forget(next(iter(decisions)))

    async def conclude(self, instance_id: str, outcome: Outcome) -> bool:
        self._state.check()
        record = self._started(instance_id)
        if record is None or record.outcome is not None:
            return False
        self._state.decisions[record.decision_id] = replace(record, outcome=outcome)
        return True

    async def of_model(self, model_id: str, limit: int = 20) -> list[DecisionRecord]:
        self._state.check()
        return [r for r in self._newest() if r.model_id == model_id][:limit]

    async def of_instance(self, instance_id: str) -> DecisionRecord | None:
        self._state.check()
        return self._started(instance_id)

    async def concluded(self, limit: int = 100) -> list[DecisionRecord]:
        self._state.check()
        return [r for r in self._newest() if r.outcome is not None][:limit]

    async def prune(self, *, keep_s: float) -> int:
        self._state.check()
        before = self._state.clock.utc() - timedelta(seconds=keep_s)
        decisions = self._state.decisions
        old = [r.decision_id for r in decisions.values() if r.made_at and r.made_at <= before]
        for decision_id in old:
            self._forget(decision_id)
        return len(old)

    def _newest(self) -> list[DecisionRecord]:
        return sorted(self._state.decisions.values(), key=lambda r: (r.made_at, r.decision_id), reverse=True)

    def _started(self, instance_id: str) -> DecisionRecord | None:
        return self._state.decisions.get(self._state.started_by.get(instance_id, ""))

    def _forget(self, decision_id: str) -> None:
        record = self._state.decisions.pop(decision_id)
        self._state.started_by.pop(record.instance_id, None)

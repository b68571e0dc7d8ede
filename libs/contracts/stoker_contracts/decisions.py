"""A placement as it was decided, what was predicted of it, and what then happened. Kept by the scheduler, read by people."""

from __future__ import annotations

from datetime import datetime

from stoker_contracts.codec import Contract
from stoker_contracts.models import Tier

OPTIONS_MAX = 8
"""Options kept of one decision, the best first; `weighed` says how many there were."""


class StagePrediction(Contract, frozen=True):
    """One stage that the weights pass on their way; all stages of a start work at the same time."""

    name: str  # remote, peer:<node>, ssd, engine (from the pool into the engine)
    size_bytes: int
    seconds: float


class StartupPrediction(Contract, frozen=True):
    """When the first token could come, by part, in seconds: total = max(queue, room) + load + engine.

    spread: of the total, as the standard deviation of its logarithm: 0.1 is about ten percent either way.
    """

    queue_s: float  # loads ahead of it on the same way
    room_s: float  # until memory is free
    load_s: float  # the slowest stage
    engine_s: float
    total_s: float
    spread: float = 0.0
    stages: tuple[StagePrediction, ...] = ()


class OptionRecord(Contract, frozen=True):
    """One way to serve a model, as it was weighed."""

    node: str
    devices: tuple[int, ...]
    source: Tier  # where its weights would come from
    origin: str  # of remote and peer: the kind of source, or the peer's node
    how: str  # free | stop | migrate | wait: how its memory becomes free
    startup: StartupPrediction


class Outcome(Contract, frozen=True):
    """What became of a start, in seconds. They are its node's own phases, and add up to total_s where queue_s is known.

    queue_s: from the decision until the worker had the order: room was made, and the order waited. None: it was decided by an
    earlier leader.  load_s: lease and load.  engine_s: everything else in the worker.
    failure: why it never became ready; '' if it did. total_s is then how long that took.
    """

    load_s: float
    engine_s: float
    total_s: float
    queue_s: float | None = None
    source: Tier = Tier.UNKNOWN
    origin: str = ""
    failure: str = ""


class DecisionRecord(Contract, frozen=True):
    """One decision on one model. chosen: index of an option; None: nothing could be done, `reason` says why."""

    decision_id: str
    term: int  # of the leader that decided
    model_id: str
    instance_id: str  # what it started; '' where it started nothing: it made room, waits, or refused
    options: tuple[OptionRecord, ...]  # at most OPTIONS_MAX, the best first
    weighed: int
    reason: str
    chosen: int | None = None
    outcome: Outcome | None = None  # once the instance is ready or failed
    made_at: datetime | None = None  # set by the database

    @property
    def option(self) -> OptionRecord | None:
        """The one that was chosen, if it is among those that are kept."""
        if self.chosen is None or not 0 <= self.chosen < len(self.options):
            return None
        return self.options[self.chosen]

    @property
    def error(self) -> float | None:
        """|predicted − actual| ÷ actual of the whole start; None where there is no prediction, or no start that succeeded."""
        if self._measured is None:
            return None
        predicted, actual = self._measured
        return _error(predicted.total_s, actual.total_s)

    @property
    def load_error(self) -> float | None:
        """As `error`, of lease and load alone: all that was predicted but the engine and the room before. Loads ahead count."""
        if self._measured is None:
            return None
        predicted, actual = self._measured
        return _error(predicted.total_s - predicted.engine_s - predicted.room_s, actual.load_s)

    @property
    def _measured(self) -> tuple[StartupPrediction, Outcome] | None:
        if self.option is None or self.outcome is None or self.outcome.failure:
            return None
        return self.option.startup, self.outcome


def _error(predicted_s: float, actual_s: float) -> float | None:
    return abs(predicted_s - actual_s) / actual_s if actual_s > 0 else None

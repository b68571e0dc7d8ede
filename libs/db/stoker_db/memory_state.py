"""What all clients of a MemoryDatabase share."""

from __future__ import annotations

from collections import deque
from datetime import datetime

from stoker_contracts.control import LinkStatus, TierStatus
from stoker_contracts.decisions import DecisionRecord
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.clock import Clock
from stoker_core.errors import DatabaseUnavailable, StaleTerm
from stoker_db.ports import DrainRow, InstanceRow, LoadObservation, ModelFile, NodeRow, Placement

KEPT_MAX = 100_000
"""Samples, observations and decisions kept at most, the newest: a simulation of days may never prune."""


class State:
    """What all clients share: the rows, the clock, who leads, and whether the database answers."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.available = True
        self.models: dict[str, ModelSpec] = {}  # by name
        self.files: dict[str, dict[str, ModelFile]] = {}  # by model id, then path
        self.manifests: dict[str, bytes] = {}  # by model id
        self.nodes: dict[str, NodeRow] = {}
        self.drains: dict[str, DrainRow] = {}
        self.instances: dict[str, InstanceRow] = {}
        self.decisions: dict[str, DecisionRecord] = {}  # in the order in which they were made
        self.started_by: dict[str, str] = {}  # instance id → decision id
        self.placements: dict[tuple[str, str, Tier], Placement] = {}
        self.samples: deque[tuple[datetime, str, TierStatus]] = deque(maxlen=KEPT_MAX)
        self.links: deque[tuple[datetime, str, LinkStatus]] = deque(maxlen=KEPT_MAX)
        self.observations: deque[tuple[datetime, LoadObservation]] = deque(maxlen=KEPT_MAX)
        self.term = 0
        self.leads: object = None  # the MemoryLeadership that does

    def check(self) -> None:
        if not self.available:
            raise DatabaseUnavailable

    def check_term(self, term: int) -> None:
        if self.term > term:
            raise StaleTerm(term, self.term)

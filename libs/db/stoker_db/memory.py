"""The repositories in memory: the same meaning as on Postgres, for tests and simulation.

Several clients share one MemoryDatabase. No method awaits between reading and writing, so each is atomic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from stoker_contracts.control import TierStatus
from stoker_contracts.models import LIVE_STATES, InstanceState, ModelSpec, StartPhases, Tier
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import (
    DatabaseUnavailable,
    LeadershipLost,
    ModelExists,
    ModelNotFound,
    NodeTaken,
    StaleTerm,
)
from stoker_db.checks import check_digests, check_files
from stoker_db.ports import InstanceRow, LoadObservation, ModelFile, NodeRow, Placement

_KEPT_MAX = 100_000
"""Samples and observations kept at most, the newest: a simulation of days may never prune."""


class _State:
    """What all clients share: the rows, the clock, who leads, and whether the database answers."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.available = True
        self.models: dict[str, ModelSpec] = {}  # by name
        self.files: dict[str, dict[str, ModelFile]] = {}  # by model id, then path
        self.nodes: dict[str, NodeRow] = {}
        self.instances: dict[str, InstanceRow] = {}
        self.placements: dict[tuple[str, str, Tier], Placement] = {}
        self.samples: deque[tuple[datetime, str, TierStatus]] = deque(maxlen=_KEPT_MAX)
        self.observations: deque[tuple[datetime, LoadObservation]] = deque(maxlen=_KEPT_MAX)
        self.term = 0
        self.leads: MemoryLeadership | None = None

    def check(self) -> None:
        if not self.available:
            raise DatabaseUnavailable


class MemoryDatabase:
    """Implements stoker_db.ports.Database. `go_down` and `come_up` stand for a restart of the server."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._state = _State(clock or SystemClock())
        self.models = MemoryModels(self._state)
        self.nodes = MemoryNodes(self._state)
        self.instances = MemoryInstances(self._state)
        self.tiers = MemoryTiers(self._state)

    def leadership(self) -> MemoryLeadership:
        return MemoryLeadership(self._state)

    async def ready(self) -> None:
        self._state.check()

    async def close(self) -> None:
        """Nothing to close; other clients go on."""

    def go_down(self) -> None:
        """From now on every call raises DatabaseUnavailable; whoever leads has lost it."""
        self._state.available = False
        self._state.leads = None

    def come_up(self) -> None:
        self._state.available = True


class MemoryModels:
    """Implements stoker_db.ports.Models."""

    def __init__(self, state: _State) -> None:
        self._state = state

    async def add(self, spec: ModelSpec, files: Sequence[ModelFile]) -> None:
        """Also raises RefusedCheckpoint for files that `check_files` refuses."""
        self._state.check()
        check_files(files)
        if spec.name in self._state.models:
            raise ModelExists(spec.name)
        self._state.models[spec.name] = spec
        self._state.files[spec.model_id] = {file.path: file for file in files}

    async def get(self, name: str) -> ModelSpec:
        self._state.check()
        if name not in self._state.models:
            raise ModelNotFound(name)
        return self._state.models[name]

    async def all(self) -> list[ModelSpec]:
        self._state.check()
        return [spec for _, spec in sorted(self._state.models.items())]

    async def files(self, model_id: str, *, with_content: bool) -> list[ModelFile]:
        self._state.check()
        files = [file for _, file in sorted(self._state.files.get(model_id, {}).items())]
        return files if with_content else [msgspec.structs.replace(file, content=None) for file in files]

    async def bind_digests(self, model_id: str, digests: dict[str, str]) -> None:
        """All or none. Paths that the model does not have (it may have been deleted meanwhile) are left out."""
        self._state.check()
        files = self._state.files.get(model_id, {})
        check_digests({path: file.digest for path, file in files.items() if path in digests}, digests)
        for path in files.keys() & digests.keys():
            files[path] = msgspec.structs.replace(files[path], digest=digests[path])

    async def delete(self, name: str) -> ModelSpec:
        self._state.check()
        spec = self._state.models.pop(name, None)
        if spec is None:
            raise ModelNotFound(name)
        del self._state.files[spec.model_id]
        for key in [key for key in self._state.placements if key[0] == spec.model_id]:
            del self._state.placements[key]
        return spec


class MemoryNodes:
    """Implements stoker_db.ports.Nodes."""

    def __init__(self, state: _State) -> None:
        self._state = state

    async def register(self, node: NodeRow, *, replaces: str | None) -> None:
        self._state.check()
        holder = self._state.nodes.get(node.name)
        if (holder.boot_id if holder else None) != replaces:
            raise NodeTaken(node.name, holder.boot_id if holder else "none")
        devices = tuple(sorted(node.devices, key=lambda device: device.index))
        self._state.nodes[node.name] = msgspec.structs.replace(node, devices=devices)

    async def leave(self, name: str, boot_id: str) -> None:
        self._state.check()
        holder = self._state.nodes.get(name)
        if holder and holder.boot_id == boot_id:
            del self._state.nodes[name]

    async def get(self, name: str) -> NodeRow | None:
        self._state.check()
        return self._state.nodes.get(name)

    async def all(self) -> list[NodeRow]:
        self._state.check()
        return [node for _, node in sorted(self._state.nodes.items())]


class MemoryInstances:
    """Implements stoker_db.ports.Instances."""

    def __init__(self, state: _State) -> None:
        self._state = state

    async def desire(self, row: InstanceRow) -> None:
        self._state.check()
        known = self._state.instances.get(row.instance_id)
        highest = max(self._state.term, known.term if known else 0)
        if highest > row.term:
            raise StaleTerm(row.term, highest)
        if known is None:
            written = msgspec.structs.replace(row, created_at=self._state.clock.utc())
        else:
            written = msgspec.structs.replace(known, desired=row.desired, term=row.term, reason=row.reason)
        self._state.instances[row.instance_id] = written

    async def record(
        self, instance_id: str, actual: InstanceState, *, reason: str = "", phases: StartPhases | None = None
    ) -> None:
        """An empty reason and phases None leave what is stored."""
        self._state.check()
        known = self._state.instances.get(instance_id)
        if known is not None:
            self._state.instances[instance_id] = msgspec.structs.replace(
                known,
                actual=actual,
                reason=reason or known.reason,
                phases=known.phases if phases is None else phases,
            )

    async def live(self) -> list[InstanceRow]:
        self._state.check()
        return [row for _, row in sorted(self._state.instances.items()) if _is_live(row)]

    async def recent(self, limit: int = 100) -> list[InstanceRow]:
        self._state.check()
        rows = self._state.instances.values()
        return sorted(rows, key=lambda row: (row.created_at, row.instance_id), reverse=True)[:limit]

    async def prune(self, *, keep_s: float) -> int:
        self._state.check()
        before = self._state.clock.utc() - timedelta(seconds=keep_s)
        rows = self._state.instances
        old = [row for row in rows.values() if row.created_at and row.created_at <= before and not _is_live(row)]
        for row in old:
            del rows[row.instance_id]
        return len(old)


def _is_live(row: InstanceRow) -> bool:
    wanted = row.desired == InstanceState.READY and row.actual != InstanceState.FAILED
    return row.actual in LIVE_STATES or wanted


class MemoryTiers:
    """Implements stoker_db.ports.Tiers."""

    def __init__(self, state: _State) -> None:
        self._state = state

    async def place(self, placement: Placement) -> None:
        """A placement of a model that has been deleted meanwhile is left out."""
        self._state.check()
        key = (placement.model_id, placement.node, placement.tier)
        if placement.held_bytes == 0:
            self._state.placements.pop(key, None)
        elif placement.model_id in self._state.files:
            self._state.placements[key] = placement

    async def placements(self, model_id: str | None = None) -> list[Placement]:
        """Ordered by model, node, tier."""
        self._state.check()
        placements = [placement for _, placement in sorted(self._state.placements.items())]
        return [p for p in placements if model_id in (None, p.model_id)]

    async def sample(self, node: str, tiers: Sequence[TierStatus]) -> None:
        self._state.check()
        now = self._state.clock.utc()
        self._state.samples.extend((now, node, tier) for tier in tiers)

    async def latest(self) -> list[tuple[str, TierStatus]]:
        """Ordered by node, tier."""
        self._state.check()
        newest = {(node, tier.tier): tier for _, node, tier in self._state.samples}
        return [(node, tier) for (node, _), tier in sorted(newest.items(), key=lambda item: item[0])]

    async def observe(self, observation: LoadObservation) -> None:
        self._state.check()
        self._state.observations.append((self._state.clock.utc(), observation))

    async def observations(self, limit: int = 100) -> list[LoadObservation]:
        self._state.check()
        return [observation for _, observation in reversed(self._state.observations)][:limit]

    async def prune(self, *, keep_s: float) -> int:
        self._state.check()
        before = self._state.clock.utc() - timedelta(seconds=keep_s)
        samples, observations = self._state.samples, self._state.observations
        count = len(samples) + len(observations)
        while samples and samples[0][0] <= before:
            samples.popleft()
        while observations and observations[0][0] <= before:
            observations.popleft()
        return count - len(samples) - len(observations)


class MemoryLeadership:
    """Implements stoker_db.ports.Leadership."""

    def __init__(self, state: _State) -> None:
        self._state = state

    async def acquire(self, leader_id: str) -> int | None:
        """Raises DatabaseUnavailable, and RuntimeError while this object leads already."""
        self._state.check()
        if self._state.leads is self:
            raise RuntimeError("this object leads already")
        if self._state.leads is not None:
            return None
        self._state.leads = self
        self._state.term += 1
        return self._state.term

    async def check(self) -> None:
        if self._state.leads is not self:
            raise LeadershipLost

    async def release(self) -> None:
        if self._state.leads is self:
            self._state.leads = None

    def break_connection(self) -> None:
        """As if the lock's connection were cut: the lock is free, and this object learns of it at its next check."""
        if self._state.leads is self:
            self._state.leads = None

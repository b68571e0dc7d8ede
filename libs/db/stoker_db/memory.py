"""The repositories in memory: the same meaning as on Postgres, for tests and simulation.

Several clients share one MemoryDatabase. No method awaits between reading and writing, so each is atomic.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import msgspec

from stoker_contracts.models import LIVE_STATES, InstanceState, ModelSpec, StartPhases
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import (
    LeadershipLost,
    ModelExists,
    ModelNotFound,
    NodeTaken,
    StaleTerm,
)
from stoker_db.checks import check_chunks, check_files
from stoker_db.memory_decisions import MemoryDecisions
from stoker_db.memory_state import State
from stoker_db.memory_tiers import MemoryTiers
from stoker_db.ports import DrainRow, InstanceRow, ModelFile, NodeRow


class MemoryDatabase:
    """Implements stoker_db.ports.Database. `go_down` and `come_up` stand for a restart of the server."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._state = State(clock or SystemClock())
        self.models = MemoryModels(self._state)
        self.nodes = MemoryNodes(self._state)
        self.instances = MemoryInstances(self._state)
        self.decisions = MemoryDecisions(self._state)
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

    def __init__(self, state: State) -> None:
        self._state = state

    async def add(self, spec: ModelSpec, files: Sequence[ModelFile], manifest: bytes = b"") -> None:
        """Also raises RefusedCheckpoint for files that `check_files` refuses."""
        self._state.check()
        check_files(files)
        if spec.name in self._state.models:
            raise ModelExists(spec.name)
        self._state.models[spec.name] = spec
        self._state.files[spec.model_id] = {file.path: file for file in files}
        self._state.manifests[spec.model_id] = manifest

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

    async def manifest(self, model_id: str) -> bytes:
        self._state.check()
        return self._state.manifests.get(model_id, b"")

    async def bind_chunks(self, model_id: str, digests: dict[str, tuple[str, ...]]) -> None:
        """Paths that the model does not have are left out."""
        self._state.check()
        files = self._state.files.get(model_id, {})
        check_chunks({path: file.chunk_digests for path, file in files.items() if path in digests}, digests)
        for path in files.keys() & digests.keys():
            files[path] = msgspec.structs.replace(files[path], chunk_digests=tuple(digests[path]))

    async def delete(self, name: str) -> ModelSpec:
        self._state.check()
        spec = self._state.models.pop(name, None)
        if spec is None:
            raise ModelNotFound(name)
        del self._state.files[spec.model_id]
        del self._state.manifests[spec.model_id]
        for key in [key for key in self._state.placements if key[0] == spec.model_id]:
            del self._state.placements[key]
        return spec


class MemoryNodes:
    """Implements stoker_db.ports.Nodes."""

    def __init__(self, state: State) -> None:
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

    async def drain(self, row: DrainRow) -> None:
        self._state.check()
        self._state.check_term(row.term)
        self._state.drains[row.node] = row

    async def undrain(self, name: str, *, term: int) -> bool:
        self._state.check()
        self._state.check_term(term)
        return self._state.drains.pop(name, None) is not None

    async def drains(self) -> list[DrainRow]:
        self._state.check()
        return [row for _, row in sorted(self._state.drains.items())]


class MemoryInstances:
    """Implements stoker_db.ports.Instances."""

    def __init__(self, state: State) -> None:
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


class MemoryLeadership:
    """Implements stoker_db.ports.Leadership."""

    def __init__(self, state: State) -> None:
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

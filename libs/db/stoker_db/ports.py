"""What services need of the database. `stoker_db.pg` and `stoker_db.memory` pass one contract suite.

Every call raises DatabaseUnavailable (retryable) when Postgres cannot be reached. Calls are single
transactions: they happen wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from stoker_contracts.control import LinkStatus, TierStatus
from stoker_contracts.decisions import DecisionRecord, Outcome
from stoker_contracts.models import Device, InstanceState, ModelSpec, StartPhases, Tier


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model.

    path: relative, no '..'.  digest: 'sha256:…' of a small file; '' for weights.
    content: the bytes of small files (tokenizer, configuration), so that a gateway needs no node; None for weights.
    version: of weights, what their source calls their contents (S3: the ETag); '' where it has no such thing.
    chunk_digests: of weights, of each chunk in order; empty before the first arrival, then binding.
    """

    path: str
    size_bytes: int
    digest: str = ""
    content: bytes | None = None
    version: str = ""
    chunk_digests: tuple[str, ...] = ()


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """Desired and actual state of one instance. `term` is the leader's that last wrote the desired state."""

    instance_id: str
    model_id: str
    node: str
    boot_id: str
    devices: tuple[int, ...]
    desired: InstanceState  # READY or STOPPED
    actual: InstanceState
    term: int
    reason: str = ""
    phases: StartPhases = StartPhases()
    created_at: datetime | None = None  # set by the database


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    boot_id: str
    devices: tuple[Device, ...] = ()


class DrainRow(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is to be empty. It outlives the node's boots: a drained node that comes back stays drained.

    term: of the leader that last wrote it.  drained: nothing was left there.
    """

    node: str
    term: int
    drained: bool = False


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a model a tier of a node holds."""

    model_id: str
    node: str
    tier: Tier
    held_bytes: int


class LoadObservation(msgspec.Struct, frozen=True, kw_only=True):
    """What one load took. origin: of remote and peer, the kind of source or the peer's node; '' otherwise."""

    model_id: str
    node: str
    source: Tier
    read_bytes: int
    load_ms: float
    wait_ms: float
    origin: str = ""


class Models(Protocol):
    async def add(self, spec: ModelSpec, files: Sequence[ModelFile], manifest: bytes = b"") -> None:
        """manifest: what the headers of its weights say, as its storage agents encode it. Raises ModelExists if the name is taken."""
        ...

    async def get(self, name: str) -> ModelSpec:
        """By name. Raises ModelNotFound."""
        ...

    async def all(self) -> list[ModelSpec]:
        """Ordered by name."""
        ...

    async def files(self, model_id: str, *, with_content: bool) -> list[ModelFile]:
        """Ordered by path; contents left out unless asked for. Empty for an unknown model."""
        ...

    async def manifest(self, model_id: str) -> bytes:
        """As it was added; empty for an unknown model."""
        ...

    async def bind_chunks(self, model_id: str, digests: dict[str, tuple[str, ...]]) -> None:
        """Set the digests of chunks of files (path → in order) that have none yet; those that are set stay. All or none.

        Nothing happens to a model that is unknown: it was deleted meanwhile.
        Raises CorruptCheckpoint naming a file's first chunk that differs from what is set.
        """
        ...

    async def delete(self, name: str) -> ModelSpec:
        """Forget a model, its files and placements. Raises ModelNotFound."""
        ...


class Nodes(Protocol):
    async def register(self, node: NodeRow, *, replaces: str | None) -> None:
        """Compare-and-set: the node's current boot id must be `replaces` (None: no such node yet). Raises NodeTaken."""
        ...

    async def leave(self, name: str, boot_id: str) -> None:
        """Forget a node that ends in order, unless another boot has its name by now."""
        ...

    async def get(self, name: str) -> NodeRow | None: ...

    async def all(self) -> list[NodeRow]:
        """Ordered by name."""
        ...

    async def drain(self, row: DrainRow) -> None:
        """Insert or replace. Raises StaleTerm below the leader's term."""
        ...

    async def undrain(self, name: str, *, term: int) -> bool:
        """False: it was not drained. Raises StaleTerm below the leader's term."""
        ...

    async def drains(self) -> list[DrainRow]:
        """Ordered by node; also of nodes that are not registered now."""
        ...


class Instances(Protocol):
    async def desire(self, row: InstanceRow) -> None:
        """Write desired state (insert, or update of desired, term and reason). Raises StaleTerm below the leader's term."""
        ...

    async def record(
        self, instance_id: str, actual: InstanceState, *, reason: str = "", phases: StartPhases | None = None
    ) -> None:
        """Write actual state, as the worker reported it. Unknown ids are ignored."""
        ...

    async def live(self) -> list[InstanceRow]:
        """Rows whose actual state is live, or whose desired state is READY and not failed; ordered by id."""
        ...

    async def recent(self, limit: int = 100) -> list[InstanceRow]:
        """Newest first."""
        ...

    async def prune(self, *, keep_s: float) -> int:
        """Delete rows created longer than keep_s ago that `live` does not list; returns how many."""
        ...


class Decisions(Protocol):
    """History, for people: not fenced."""

    async def add(self, record: DecisionRecord) -> None:
        """Its outcome and made_at are left out. Adding one again changes nothing."""
        ...

    async def conclude(self, instance_id: str, outcome: Outcome) -> bool:
        """Set what became of the start of this instance. False: no decision started it, or its outcome is set already."""
        ...

    async def of_model(self, model_id: str, limit: int = 20) -> list[DecisionRecord]:
        """Newest first."""
        ...

    async def of_instance(self, instance_id: str) -> DecisionRecord | None:
        """The one that started it."""
        ...

    async def concluded(self, limit: int = 100) -> list[DecisionRecord]:
        """Those whose outcome is known, newest first."""
        ...

    async def prune(self, *, keep_s: float) -> int:
        """Delete decisions made longer than keep_s ago; returns how many."""
        ...


class Tiers(Protocol):
    async def place(self, placement: Placement) -> None:
        """Insert or replace; held_bytes 0 removes."""
        ...

    async def placements(self, model_id: str | None = None) -> list[Placement]: ...

    async def sample(self, node: str, tiers: Sequence[TierStatus], links: Sequence[LinkStatus] = ()) -> None:
        """Store one sample of a node's tiers and of its links to peers."""
        ...

    async def latest(self) -> list[tuple[str, TierStatus]]:
        """(node, newest sample of each of its tiers)."""
        ...

    async def links(self) -> list[tuple[str, LinkStatus]]:
        """(node, newest sample of each of its links)."""
        ...

    async def observe(self, observation: LoadObservation) -> None: ...

    async def observations(self, limit: int = 100) -> list[LoadObservation]:
        """Newest first."""
        ...

    async def prune(self, *, keep_s: float) -> int:
        """Delete metric samples and observations older than keep_s; returns how many."""
        ...


class Leadership(Protocol):
    """An advisory lock on a connection of its own, and the term that fences its holder."""

    async def acquire(self, leader_id: str) -> int | None:
        """Try to lead: the new term, or None while another leads. Taking the lock increments the term."""
        ...

    async def check(self) -> None:
        """Ping the lock's connection. Raises LeadershipLost if it is gone."""
        ...

    async def release(self) -> None:
        """Give the lock up. Idempotent."""
        ...


class Database(Protocol):
    @property
    def models(self) -> Models: ...
    @property
    def nodes(self) -> Nodes: ...
    @property
    def instances(self) -> Instances: ...
    @property
    def decisions(self) -> Decisions: ...
    @property
    def tiers(self) -> Tiers: ...

    def leadership(self) -> Leadership: ...

    async def ready(self) -> None:
        """Raises DatabaseUnavailable unless a query is answered."""
        ...

    async def close(self) -> None: ...

"""What the leader remembers of a node and of an instance."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_contracts.control import InstanceStatus, StoreStatus, WorkerStatus
from stoker_contracts.models import Device, InstanceState
from stoker_db.ports import DrainRow, InstanceRow
from stoker_policy import EngineState, LoadView

RETIRED_MAX = 8
ENDED_STATES = frozenset({InstanceState.STOPPED, InstanceState.FAILED})


@dataclass
class Node:
    """One node. answered: what it last said, it said knowing this leader's term, and it answers commands.

    heard_s: when this leader last heard it; None: never.  retired: its earlier boots, whose late words are dropped.
    store, store_heard_s: what its storage agent said last, and when.
    drain: that it is to be empty; None: it may be used.
    absurd, absurd_s: what it said last that cannot be true, and when.
    """

    name: str
    devices: tuple[Device, ...] = ()
    status: WorkerStatus | None = None
    heard_s: float | None = None
    answered: bool = False
    silent: bool = False
    retired: tuple[str, ...] = ()
    store: StoreStatus | None = None
    store_heard_s: float = 0.0
    prepare_asked_s: dict[str, float] = field(default_factory=dict)
    drain: DrainRow | None = None
    absurd: str = ""
    absurd_s: float = 0.0

    @property
    def boot_id(self) -> str:
        return self.status.boot_id if self.status else ""

    @property
    def draining(self) -> bool:
        """Nothing new goes there: it is to be empty, or its worker says that it ends."""
        return self.drain is not None or (self.status is not None and self.status.draining)


@dataclass
class Tracked:
    """One instance that is live, or that ended and is not yet recorded so.

    row: as Postgres has it, or is about to.  written: Postgres has it.  status: as its worker last reported it.
    reserved_until_s: a start that was decided and does not show yet holds its devices until then.
    gone: why it is no longer on its node's list.
    decided_s: when its start was decided, what it was expected to load, and what its engine started from; of starts of this leader.
    """

    row: InstanceRow
    gpu_bytes: int | None
    written: bool
    status: InstanceStatus | None = None
    reserved_until_s: float | None = None
    gone: str = ""
    stop_asked_s: float | None = None
    stops: int = 0
    decided_s: float | None = None
    load: LoadView | None = None
    engine: EngineState | None = None

    @property
    def state(self) -> InstanceState:
        if self.gone:
            meant = self.row.desired is InstanceState.STOPPED
            return InstanceState.STOPPED if meant else InstanceState.FAILED
        return self.status.state if self.status else self.row.actual

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

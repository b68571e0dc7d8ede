"""What a decision sees: facts with their ages in milliseconds, never points in time."""

from __future__ import annotations

import msgspec

from stoker_contracts.models import LIVE_STATES, Device, InstanceState, ModelSpec


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a `Cluster`: compared by value, never changed."""


class HeldView(View, frozen=True):
    """How much of a model a tier of a node holds; less than all of it while it arrives or after a part was lost."""

    model_id: str
    held_bytes: int


class NodeView(View, frozen=True):
    """One node.

    answered: it reported its state to this leader's term.  prepared: architectures whose first start is paid.
    preparing: architectures asked for too recently to ask again.
    """

    name: str
    devices: tuple[Device, ...]
    answered: bool = True
    silent: bool = False
    draining: bool = False
    zygote_ready: bool = True
    prepared: tuple[str, ...] = ()
    preparing: tuple[str, ...] = ()
    held: tuple[HeldView, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether commands may go there."""
        return self.answered and not self.silent and not self.draining

    def held_bytes(self, model_id: str) -> int:
        """In the tier that holds most of it: two tiers may hold the same part."""
        return max((h.held_bytes for h in self.held if h.model_id == model_id), default=0)


class InstanceView(View, frozen=True):
    """One instance, or a start that was decided and does not show yet.

    gpu_bytes: on each of its GPUs; None (its model is unknown): it holds them whole. CPU slots are always held whole.
    stop_asked_ms: since the last stop command; None: it is meant to run.  stops: stop commands so far.
    """

    instance_id: str
    model_id: str
    node: str
    devices: tuple[int, ...]
    state: InstanceState
    gpu_bytes: int | None
    running: int = 0
    idle_ms: int = 0
    stop_asked_ms: int | None = None
    stops: int = 0

    @property
    def live(self) -> bool:
        """Whether it may hold memory. A state of a newer version counts as live."""
        return self.state in LIVE_STATES or self.state is InstanceState.UNKNOWN

    @property
    def leaving(self) -> bool:
        return self.stop_asked_ms is not None or self.state is InstanceState.STOPPING

    @property
    def idle(self) -> bool:
        return self.state is InstanceState.READY and not self.leaving and self.running == 0


class DemandView(View, frozen=True):
    """What all gateways together want of one model now."""

    model_id: str
    queued: int
    oldest_wait_ms: int


class FailureView(View, frozen=True):
    """Starts of one model that failed in a row, and how long ago the last one did."""

    model_id: str
    in_row: int
    since_ms: int


class Cluster(View, frozen=True):
    """Everything that a decision depends on. The order of the tuples means nothing."""

    nodes: tuple[NodeView, ...] = ()
    instances: tuple[InstanceView, ...] = ()
    models: tuple[ModelSpec, ...] = ()
    demands: tuple[DemandView, ...] = ()
    failures: tuple[FailureView, ...] = ()

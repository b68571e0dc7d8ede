"""What a decision sees: facts with their ages in milliseconds, never points in time."""

from __future__ import annotations

import msgspec

from stoker_contracts.models import LIVE_STATES, Device, InstanceState, Tier


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every fact and of what is made of facts: compared by value, never changed."""


class HeldView(View, frozen=True):
    """How much of a model a node's storage agent holds; less than all of it while it arrives or after a part was lost.

    Both tiers may hold the same part.
    """

    node: str
    model_id: str
    dram_bytes: int = 0
    ssd_bytes: int = 0


class NodeView(View, frozen=True):
    """One node.

    answered: it reported its state to this leader's term.  absurd: it reported what cannot be.  prepared: architectures
    whose first start is paid.  preparing: architectures asked for too recently to ask again.
    """

    name: str
    devices: tuple[Device, ...]
    answered: bool = True
    silent: bool = False
    draining: bool = False
    absurd: bool = False
    zygote_ready: bool = True
    prepared: tuple[str, ...] = ()
    preparing: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether commands may go there."""
        return self.answered and not self.silent and not self.draining and not self.absurd


class LoadView(View, frozen=True):
    """What a start brings, as it was predicted.

    source, origin: where most of the time goes: the slowest tier, and of a peer its node.  size_bytes: that come from there.
    wait_s: until its turn, from the decision on.  load_s: from then on.
    """

    source: Tier
    origin: str
    size_bytes: int
    wait_s: float
    load_s: float

    def left_bytes(self, age_ms: int) -> int:
        """Still to come so long after the decision, at an even pace."""
        gone_s = age_ms / 1000 - self.wait_s
        if gone_s <= 0:
            return self.size_bytes
        return 0 if gone_s >= self.load_s else round(self.size_bytes * (1 - gone_s / self.load_s))


class InstanceView(View, frozen=True):
    """One instance, or a start that was decided and does not show yet.

    gpu_bytes: on each of its GPUs; None (its model is unknown): it holds them whole. CPU slots are always held whole.
    age_ms: since its start was decided.  load: of one that starts.
    running: requests in hand.  running_tokens: prompts and outputs of all of them.  generated_tokens: of the one with the
    fewest.  token_s: between two tokens of a request; 0: unknown.
    stop_asked_ms: since the last stop command; None: it is meant to run.  stops: stop commands so far.
    """

    instance_id: str
    model_id: str
    node: str
    devices: tuple[int, ...]
    state: InstanceState
    gpu_bytes: int | None
    age_ms: int = 0
    load: LoadView | None = None
    running: int = 0
    running_tokens: int = 0
    generated_tokens: int = 0
    token_s: float = 0.0
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

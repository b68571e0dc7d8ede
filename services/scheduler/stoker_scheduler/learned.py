"""What statuses teach: how long starts took, how fast tiers and links are, for how long models idle."""

from __future__ import annotations

from stoker_contracts.control import InstanceStatus, StoreStatus, WorkerStatus
from stoker_contracts.models import EngineKind, InstanceState, ModelSpec
from stoker_policy import Absurd, EngineState, Estimates, IdleTimes, LoadView, StartSeen

MEMORY_BYTES_MAX = 1 << 50
"""Of one device: no machine has a tenth of it."""
CHANGED_S = 1.0
"""An idle time that began this much later than was known began anew: a request came and went between two statuses."""


class Learned:
    """Owns the estimates. Everything that cannot be true raises Absurd and teaches nothing."""

    def __init__(self) -> None:
        self.estimates = Estimates()
        self.idle_times = IdleTimes()
        self._idle_since_s: dict[str, float] = {}

    def start(
        self, node: str, model: ModelSpec, status: InstanceStatus, engine: EngineState, load: LoadView | None
    ) -> None:
        """An instance became ready. engine: what it started from.  load: what was expected of its weights."""
        phases = status.phases
        expected = load is not None and load.source is status.load_source
        self.estimates.observe_start(
            StartSeen(
                node=node,
                model_id=model.model_id,
                architecture=model.architecture,
                engine_kind=EngineKind(model.engine),
                engine=engine,
                weight_bytes=model.weight_bytes,
                source=status.load_source,
                origin=status.load_origin,
                source_bytes=load.size_bytes if load is not None and expected else 0,
                load_s=(phases.lease_ms + phases.load_ms) / 1000,
                engine_s=(phases.fork_ms + phases.engine_ms + phases.announce_ms) / 1000,
                ranks=max(1, model.tensor_parallel),
            )
        )

    def store(self, status: StoreStatus) -> None:
        """A storage agent's own averages."""
        for held in status.held:
            if held.held_bytes < 0 or held.total_bytes < 0:
                raise Absurd("held_bytes", min(held.held_bytes, held.total_bytes), MEMORY_BYTES_MAX)
        for tier in status.tiers:
            self.estimates.observe_tier(status.node, tier.tier, tier.read_bytes_per_s)
        for link in status.links:
            self.estimates.observe_link(status.node, link.peer, link.read_bytes_per_s)

    def check(self, status: WorkerStatus) -> None:
        """Raises Absurd for devices and instances that cannot be."""
        for device in status.devices:
            if not 0 < device.memory_bytes <= MEMORY_BYTES_MAX:
                raise Absurd("memory_bytes", device.memory_bytes, MEMORY_BYTES_MAX)
        for instance in status.instances:
            least = min(instance.running, instance.idle_ms, instance.age_ms)
            if least < 0:
                raise Absurd(f"running, idle_ms or age_ms of {instance.instance_id}", least, MEMORY_BYTES_MAX)

    def busy(self, model_id: str, now_s: float) -> None:
        """Somebody wants it or is served by it: an idle time, if there was one, is over."""
        since_s = self._idle_since_s.pop(model_id, None)
        if since_s is not None and now_s > since_s:
            self.idle_times.observe(model_id, now_s - since_s)

    def idle(self, model_id: str, since_s: float) -> None:
        """An instance of it is idle."""
        known_s = self._idle_since_s.get(model_id)
        if known_s is None:
            self._idle_since_s[model_id] = since_s
        elif since_s > known_s + CHANGED_S:
            self.idle_times.observe(model_id, since_s - known_s)
            self._idle_since_s[model_id] = since_s

    def seen(self, status: WorkerStatus, wanted: set[str], now_s: float) -> None:
        """Which models a node serves, and which idle there. wanted: models that are demanded."""
        for instance in status.instances:
            if instance.running > 0 or instance.model_id in wanted:
                self.busy(instance.model_id, now_s)
            elif instance.state is InstanceState.READY:
                self.idle(instance.model_id, now_s - instance.idle_ms / 1000)

    def forget(self, models: dict[str, ModelSpec]) -> None:
        """Models that are not registered any more."""
        for model_id in [m for m in self._idle_since_s if m not in models]:
            del self._idle_since_s[model_id]
            self.idle_times.forget(model_id)

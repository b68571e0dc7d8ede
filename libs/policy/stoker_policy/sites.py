"""One node as decisions look it up: what is left of each device, who lives there, what still has to be loaded."""

from __future__ import annotations

from collections.abc import Iterable

from stoker_contracts.models import Device, DeviceKind, EngineKind, ModelSpec, Tier
from stoker_policy.estimate import EngineState
from stoker_policy.facts import InstanceView, NodeView

NETWORK, DISK, MEMORY = "network", "disk", "memory"
LANES = {Tier.REMOTE: NETWORK, Tier.PEER: NETWORK, Tier.SSD: DISK, Tier.DRAM: MEMORY}
"""What loads from each tier share on the node that loads: they wait for one another only where they take the same way."""


class Slot:
    """One device. used_bytes: of live instances, more than there is if too much is promised already."""

    __slots__ = ("device", "residents", "used_bytes")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.used_bytes = 0
        self.residents: dict[str, InstanceView] = {}

    @property
    def free_bytes(self) -> int:
        return self.device.memory_bytes - self.used_bytes

    def held_bytes(self, instance: InstanceView) -> int:
        """What an instance takes of this device."""
        if instance.gpu_bytes is None or self.device.kind is DeviceKind.CPU:
            return self.device.memory_bytes
        return instance.gpu_bytes


class Site:
    """One node; `view` is None while only its instances are known.

    loads: live instances that still load.  model_bytes: model → (DRAM, SSD) held by its storage agent.
    """

    __slots__ = ("instances", "loads", "model_bytes", "name", "slots", "view")

    def __init__(self, name: str) -> None:
        self.name = name
        self.view: NodeView | None = None
        self.slots: dict[int, Slot] = {}
        self.instances: dict[str, InstanceView] = {}
        self.loads: dict[str, InstanceView] = {}
        self.model_bytes: dict[str, tuple[int, int]] = {}

    @property
    def usable(self) -> bool:
        return self.view is not None and self.view.usable

    @property
    def in_use(self) -> bool:
        """Whether its instances count as serving: one that has not answered this term may still have them."""
        return self.view is not None and not self.view.silent and not self.view.draining

    def serves(self, model: ModelSpec) -> bool:
        """Whether an instance of it could be started there now, room apart."""
        view = self.view
        return view is not None and view.usable and (view.zygote_ready or model.engine is not EngineKind.VLLM)

    def engine_state(self, model: ModelSpec) -> EngineState:
        """What an engine would start from: an architecture's first start pays what the later ones do not."""
        view = self.view
        if view is None or not view.zygote_ready:
            return EngineState.COLD
        ready = model.engine is not EngineKind.VLLM or model.architecture in view.prepared
        return EngineState.ZYGOTE if ready else EngineState.COLD

    def set_view(self, view: NodeView | None) -> None:
        before = self.view.devices if self.view else ()
        self.view = view
        if (view.devices if view else ()) != before:
            self.slots = {device.index: Slot(device) for device in (view.devices if view else ())}
            for instance in self.instances.values():
                self._seat(instance)

    def put(self, instance: InstanceView) -> None:
        before = self.instances.get(instance.instance_id)
        if before is not None:
            self._leave(before)
        self.instances[instance.instance_id] = instance
        self._seat(instance)
        if instance.load is not None and instance.live:
            self.loads[instance.instance_id] = instance
        else:
            self.loads.pop(instance.instance_id, None)

    def drop(self, instance: InstanceView) -> None:
        self._leave(self.instances.pop(instance.instance_id))
        self.loads.pop(instance.instance_id, None)

    def _seat(self, instance: InstanceView) -> None:
        if instance.live:
            for slot in self._slots(instance.devices):
                slot.residents[instance.instance_id] = instance
                slot.used_bytes += slot.held_bytes(instance)

    def _leave(self, instance: InstanceView) -> None:
        if instance.live:
            for slot in self._slots(instance.devices):
                del slot.residents[instance.instance_id]
                slot.used_bytes -= slot.held_bytes(instance)

    def _slots(self, indexes: Iterable[int]) -> list[Slot]:
        """Each once; devices that the node does not report are nobody's."""
        return [self.slots[index] for index in dict.fromkeys(indexes) if index in self.slots]

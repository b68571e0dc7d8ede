"""Where a demanded model can start: on a device with memory left, or on one where an idle instance makes room."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from stoker_contracts.models import Device, DeviceKind, EngineKind, ModelSpec
from stoker_policy.cluster import Cluster, InstanceView, NodeView


@dataclass
class Room:
    """One device while a decision is made.

    free_bytes: left after live instances and what this decision gave away; negative if room is yet to be made.
    coming_bytes: held by instances that are about to end.
    """

    node: NodeView
    device: Device
    free_bytes: int
    coming_bytes: int = 0
    crowd: int = 0
    idle: list[InstanceView] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return (self.node.name, self.device.index)

    def take(self, size_bytes: int) -> None:
        self.free_bytes -= size_bytes
        self.crowd += 1

    def leave(self, instance: InstanceView) -> None:
        """An instance here was told to stop."""
        self.coming_bytes += _size_bytes(instance, self)
        self.idle = [i for i in self.idle if i.instance_id != instance.instance_id]


def rooms(cluster: Cluster, leaving: Iterable[str], spared: Iterable[str]) -> list[Room]:
    """Every device of every usable node, by (node, index).

    leaving: ids of instances that this decision stops.  spared: models whose idle instances must stay.
    """
    by_key = {
        (node.name, device.index): Room(node, device, device.memory_bytes)
        for node in cluster.nodes
        if node.usable
        for device in node.devices
    }
    leaving, spared = set(leaving), set(spared)
    for instance in sorted(cluster.instances, key=lambda i: i.instance_id):
        if not instance.live:
            continue
        for index in instance.devices:
            room = by_key.get((instance.node, index))
            if room is None:
                continue
            room.take(_size_bytes(instance, room))
            if instance.leaving or instance.instance_id in leaving:
                room.leave(instance)
            elif instance.idle and instance.model_id not in spared and len(instance.devices) == 1:
                room.idle.append(instance)
    return [by_key[key] for key in sorted(by_key)]


def fit(model: ModelSpec, where: list[Room]) -> Room | None:
    """The device that takes `model` now: the emptiest, then the node that holds most of it, then by (node, index)."""
    fits = [r for r in where if _serves(r.node, model) and r.free_bytes >= model.bytes_on(r.device)]
    return min(fits, key=lambda r: (r.crowd, -r.node.held_bytes(model.model_id), r.key), default=None)


def coming(model: ModelSpec, where: list[Room]) -> Room | None:
    """The device that will take `model` once those who leave it are gone, by (node, index)."""
    fits = [r for r in where if _serves(r.node, model) and r.free_bytes + r.coming_bytes >= model.bytes_on(r.device)]
    return min(fits, key=lambda r: r.key, default=None)


def make_room(model: ModelSpec, where: list[Room]) -> tuple[Room, list[InstanceView]] | None:
    """The device to clear for `model` and its idle instances to stop there, longest idle first, ties by id.

    Fewest instances, then the one whose shortest-idle victim is idle longest, then by (node, index).
    """
    options = []
    for room in where:
        if not _serves(room.node, model):
            continue
        missing_bytes = model.bytes_on(room.device) - room.free_bytes - room.coming_bytes
        victims = []
        for instance in sorted(room.idle, key=lambda i: (-i.idle_ms, i.instance_id)):
            victims.append(instance)
            missing_bytes -= _size_bytes(instance, room)
            if missing_bytes <= 0:
                options.append((room, victims))
                break
    return min(options, key=lambda o: (len(o[1]), -o[1][-1].idle_ms, o[1][-1].instance_id, o[0].key), default=None)


def _serves(node: NodeView, model: ModelSpec) -> bool:
    return node.zygote_ready or model.engine is not EngineKind.VLLM


def _size_bytes(instance: InstanceView, room: Room) -> int:
    whole = instance.gpu_bytes is None or room.device.kind is DeviceKind.CPU
    return room.device.memory_bytes if whole else instance.gpu_bytes or 0

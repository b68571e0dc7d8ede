"""Machines of a simulated cluster."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from stoker_sim.profiles.quantities import Bytes, BytesPerSecond, Count, Name, Part, Ratio


class Devices(Part, frozen=True):
    """The devices of one node, all alike.

    memory_bytes, pcie_bytes_per_s: of each; the latter from pinned host memory.
    prefill_ratio, decode_ratio: how fast, beside the device that the models' figures are for: 2 is twice as fast.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=64)]
    memory_bytes: Bytes
    pcie_bytes_per_s: BytesPerSecond
    name: str = ""
    kind: Literal["cpu", "cuda"] = "cuda"
    prefill_ratio: Ratio = 1.0
    decode_ratio: Ratio = 1.0


class NodeKind(Part, frozen=True):
    """Nodes that are alike.

    dram_bytes: what the pool may hold.  ssd_bytes_per_s: reading.  network_bytes_per_s: to peers, in each direction.
    remote_bytes_per_s: from the models' own source, of one node; never more than the network gives if both are one wire.
    """

    name: Name
    count: Count
    devices: Devices
    dram_bytes: Bytes
    ssd_bytes: Bytes
    ssd_bytes_per_s: BytesPerSecond
    network_bytes_per_s: BytesPerSecond
    remote_bytes_per_s: BytesPerSecond

    @property
    def names(self) -> list[str]:
        """Of its nodes."""
        return numbered(self.name, self.count)


class Hardware(Part, frozen=True):
    nodes: Annotated[tuple[NodeKind, ...], msgspec.Meta(min_length=1)]

    @property
    def by_name(self) -> dict[str, NodeKind]:
        """Every single node."""
        return {name: kind for kind in self.nodes for name in kind.names}

    @property
    def device_count(self) -> int:
        return sum(kind.count * kind.devices.count for kind in self.nodes)


def numbered(name: str, count: int) -> list[str]:
    """name-0, name-1, …, with as many digits each as the last has, so that they sort; the name alone if there is one."""
    digits = len(str(count - 1))
    return [f"{name}-{index:0{digits}}" for index in range(count)] if count > 1 else [name]

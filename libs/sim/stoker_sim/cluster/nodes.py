"""One node of a simulated cluster: its devices, its tiers, and how weights get through them into an engine."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import NamedTuple

from stoker_contracts.models import Device, DeviceKind, Tier
from stoker_sim.cluster.instances import Instance
from stoker_sim.cluster.lines import Line
from stoker_sim.cluster.shelves import Eviction, Lane, NewsOfHeld, Shelf, take
from stoker_sim.profiles import LoaderProfile, NodeKind


class Seat:
    """One device. busy: instances on it that have work in hand, since busy_since_s; busy_s: before that."""

    __slots__ = ("busy", "busy_s", "busy_since_s", "device", "free_bytes", "residents")

    def __init__(self, device: Device) -> None:
        self.device, self.free_bytes = device, device.memory_bytes
        self.residents: dict[str, Instance] = {}
        self.busy, self.busy_s, self.busy_since_s = 0, 0.0, 0.0


class Way(NamedTuple):
    """Where weights come from, and what they pass before the copy to the device. joins_s: they are on their way already, until then."""

    tier: Tier
    origin: str
    lanes: tuple[Lane, ...]
    bytes_per_s: float
    joins_s: float = 0.0


class Load(NamedTuple):
    """arrived_s: when the pool has all.  loaded_s: when the engine has.  pinned: the pool keeps it until then."""

    way: Way
    arrived_s: float
    loaded_s: float
    pinned: bool = False


class Fetching(NamedTuple):
    """until_s: when it ends, if no start uses its links.  used_s: of the most used of them, when that was said."""

    way: Way
    until_s: float
    used_s: float


class Node:
    """tiers: those in which the policy's system keeps models; without DRAM every start brings its own bytes.

    Transfers queue: each of the ways to this node (its SSD; its network card, in and out) carries one at a time. The model
    store is behind the network card, or behind a way of its own where it is slower than the card.
    Each device has its own link to host memory.
    """

    def __init__(
        self,
        name: str,
        kind: NodeKind,
        loader: LoaderProfile,
        *,
        tiers: Collection[Tier],
        eviction: Eviction,
        news: NewsOfHeld,
    ) -> None:
        self.name, self.kind, self.loader = name, kind, loader
        devices = kind.devices
        self.seats = [
            Seat(
                Device(index=index, kind=DeviceKind(devices.kind), name=devices.name, memory_bytes=devices.memory_bytes)
            )
            for index in range(devices.count)
        ]
        self.instances: dict[str, Instance] = {}
        self._dram = self._ssd = None
        ssd_rate, remote_rate = kind.ssd_bytes_per_s * loader.ssd, kind.remote_bytes_per_s * loader.remote
        if Tier.DRAM in tiers:
            self._dram = Shelf(kind.dram_bytes, eviction=eviction, refetch_bytes_per_s=ssd_rate)
        if Tier.SSD in tiers:
            self._ssd = Shelf(kind.ssd_bytes, eviction=eviction, refetch_bytes_per_s=remote_rate)
        self._disk = Lane(ssd_rate)
        self._card_in = Lane(kind.network_bytes_per_s * loader.peer)
        self._card_out = Lane(kind.network_bytes_per_s * loader.peer)
        one_wire = kind.remote_bytes_per_s >= kind.network_bytes_per_s
        self._store = self._card_in if one_wire else Lane(remote_rate)
        self._remote_rate = remote_rate
        self._device_rate = devices.pcie_bytes_per_s * loader.dram
        self._arriving: dict[str, tuple[float, Way]] = {}
        self._news = news

    # Devices

    def fits(self, line: Line, index: int) -> bool:
        """Now."""
        seat = self.seats[index]
        return line.spec.bytes_on(seat.device) <= seat.free_bytes

    def admit(self, instance: Instance) -> None:
        for index in instance.devices:
            seat = self.seats[index]
            seat.free_bytes -= instance.line.spec.bytes_on(seat.device)
            assert seat.free_bytes >= 0, f"device {index} of {self.name} is over-committed by {-seat.free_bytes} bytes"
            seat.residents[instance.instance_id] = instance
        self.instances[instance.instance_id] = instance

    def release(self, instance: Instance) -> None:
        for index in instance.devices:
            seat = self.seats[index]
            seat.free_bytes += instance.line.spec.bytes_on(seat.device)
            del seat.residents[instance.instance_id]
        del self.instances[instance.instance_id]

    def occupy(self, instance: Instance, change: int, now_s: float) -> None:
        """change: 1 as it gets work, -1 as it has none any more."""
        for index in instance.devices:
            seat = self.seats[index]
            if seat.busy:
                seat.busy_s += now_s - seat.busy_since_s
            seat.busy += change
            seat.busy_since_s = now_s

    # Weights

    def holds(self, name: str) -> tuple[bool, bool]:
        """In DRAM, on the SSD: all of it."""
        in_dram = self._dram is not None and name in self._dram and name not in self._arriving
        return in_dram, self._ssd is not None and name in self._ssd

    def stock(self, line: Line, now_s: float) -> None:
        """Have a model on the SSD, if this system keeps models there."""
        if self._ssd is not None:
            self._gone(self._ssd.put(line.name, line.spec.weight_bytes, now_s))
            self._tell(line.name)

    def way(self, line: Line, now_s: float, givers: Collection[Node] = ()) -> Way:
        """The nearest: the pool, what comes there already, the SSD, the first giver that still has it, the model's own store."""
        arriving = self._arriving.get(line.name)
        if arriving is not None:
            return arriving[1]._replace(joins_s=arriving[0])
        in_dram, on_ssd = self.holds(line.name)
        if in_dram:
            return Way(Tier.DRAM, "", (), inf)
        if on_ssd:
            return Way(Tier.SSD, "", (self._disk,), self._disk.bytes_per_s)
        for giver in givers:
            has_dram, has_ssd = giver.holds(line.name)
            if has_dram or has_ssd:
                lanes = (self._card_in, giver._card_out) if has_dram else (self._card_in, giver._card_out, giver._disk)
                return Way(Tier.PEER, giver.name, lanes, min(lane.bytes_per_s for lane in lanes))
        return Way(Tier.REMOTE, line.spec.source.partition(":")[0], (self._store,), self._remote_rate)

    def expected_load_s(self, line: Line, now_s: float) -> float:
        """What a load decided now would take, by the very figures of the simulation."""
        way = self.way(line, now_s)
        if way.joins_s:
            return self._load(line, way, now_s, max(now_s, way.joins_s)).loaded_s - now_s
        begins_s = max([now_s, *(lane.free_s for lane in way.lanes)])
        return self._load(line, way, begins_s, begins_s + line.spec.weight_bytes / way.bytes_per_s).loaded_s - now_s

    def load(self, line: Line, now_s: float, givers: Collection[Node] = ()) -> Load:
        """Bring a model's weights into an engine, and leave them in the tiers that they pass."""
        way, name, size_bytes = self.way(line, now_s, givers), line.name, line.spec.weight_bytes
        if way.joins_s or way.tier is Tier.DRAM:
            load = self._load(line, way, now_s, max(now_s, way.joins_s))
        else:
            load = self._load(line, way, *take(way.lanes, size_bytes, way.bytes_per_s, now_s))
        if self._dram is not None:
            gone = self._dram.put(name, size_bytes, now_s)
            if gone is not None:
                self._gone(gone)
                self._dram.pin(name)
                load = load._replace(pinned=True)
            if load.arrived_s > now_s and not way.joins_s:
                self._arriving[name] = (load.arrived_s, way)
        if self._ssd is not None and name in self._ssd:
            self._ssd.use(name, now_s)
        return load

    def fetch(self, line: Line, now_s: float, givers: Collection[Node] = ()) -> Fetching | None:
        """Begin to bring a model into memory ahead; None if it is there, on its way, or its links fetch something else already."""
        way = self.way(line, now_s, givers)
        if self._dram is None or way.tier is Tier.DRAM or way.joins_s or any(lane.fetches for lane in way.lanes):
            return None
        for lane in way.lanes:
            lane.fetches += 1
        begins_s = max(now_s, *(lane.free_s for lane in way.lanes))
        used_s = max(lane.used_s for lane in way.lanes)
        return Fetching(way, begins_s + line.spec.weight_bytes / way.bytes_per_s, used_s)

    def fetched(self, line: Line, fetching: Fetching, now_s: float) -> Fetching | None:
        """What is left of it, as starts used its links meanwhile; None: it is in memory, if there was room without evicting."""
        lanes = fetching.way.lanes
        used_s = max(lane.used_s for lane in lanes)
        if used_s > fetching.used_s:
            begins_s = max(now_s, *(lane.free_s for lane in lanes))
            return Fetching(fetching.way, begins_s + used_s - fetching.used_s, used_s)
        for lane in lanes:
            lane.fetches -= 1
        name, size_bytes = line.name, line.spec.weight_bytes
        assert self._dram is not None
        if name not in self._dram and self._dram.used_bytes + size_bytes <= self._dram.size_bytes:
            self._dram.put(name, size_bytes, now_s)
            if self._ssd is not None:
                self._gone(self._ssd.put(name, size_bytes, now_s))
            self._tell(name)
        return None

    def arrived(self, line: Line, now_s: float) -> None:
        """The pool has all of what came."""
        arriving = self._arriving.get(line.name)
        if arriving is None or arriving[0] > now_s:
            return
        del self._arriving[line.name]
        if self._ssd is not None and arriving[1].tier in (Tier.REMOTE, Tier.PEER):
            self._gone(self._ssd.put(line.name, line.spec.weight_bytes, now_s))
        self._tell(line.name)

    def loaded(self, line: Line) -> None:
        """An engine has its copy of what was pinned for it."""
        assert self._dram is not None
        self._dram.unpin(line.name)

    def _load(self, line: Line, way: Way, begins_s: float, arrives_s: float) -> Load:
        copy_s = line.spec.weight_bytes / max(1, line.spec.tensor_parallel) / self._device_rate
        copied_s = max(arrives_s, begins_s + copy_s) if self.loader.pipelined else arrives_s + copy_s
        return Load(way, arrives_s, copied_s + self.loader.fixed_s)

    def _gone(self, names: tuple[str, ...] | None) -> None:
        for name in names or ():
            self._tell(name)

    def _tell(self, name: str) -> None:
        self._news(self.name, name, *self.holds(name))

"""The ways in which a model could be served on one node, and how soon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import NamedTuple

from stoker_contracts.models import DeviceKind, InstanceState, ModelSpec, Tier
from stoker_policy.cluster import Cluster
from stoker_policy.commands import How, Option
from stoker_policy.facts import InstanceView, LoadView
from stoker_policy.reserve import Reserved
from stoker_policy.room import Clearing, Leaver, clear
from stoker_policy.sites import LANES, Site, Slot
from stoker_policy.startup import StartFacts, Startup

PEERS_MAX = 2
"""Peers that are weighed for one decision: those that give least already."""
SPARE_DEVICES = 2
"""Devices of a node that are looked at beyond those that are needed."""
RESOLUTION_S = 0.01
"""Estimates that differ by less are equal, and something else decides."""


class Weighed(NamedTuple):
    """An option with what it takes. order: the smallest is the best."""

    order: tuple[float, int, int, int, tuple[str, ...], str, tuple[int, ...]]
    option: Option
    leavers: tuple[Leaver, ...]
    load: LoadView
    sources: tuple[str, ...]


class Weighing:
    """One model, weighed on one node after the other. leaver: see `room.clear`."""

    def __init__(
        self,
        cluster: Cluster,
        model: ModelSpec,
        reserved: Reserved,
        leaver: Callable[[InstanceView, Slot], Leaver | None],
    ) -> None:
        self._cluster, self._model, self._reserved, self._leaver = cluster, model, reserved, leaver
        self._ranks = max(1, model.tensor_parallel)
        self._gpu_bytes, self._cpu_bytes = model.gpu_bytes, model.cpu_bytes
        self._peers: list[str] | None = None

    def missing_bytes(self, site: Site, slot: Slot) -> int:
        """On a device, once earlier decisions are carried out: as `ModelSpec.bytes_on`, computed once."""
        device = slot.device
        whole = device.kind is DeviceKind.CPU
        need_bytes = max(self._cpu_bytes, device.memory_bytes) if whole else self._gpu_bytes
        missing_bytes = need_bytes + slot.used_bytes - device.memory_bytes
        if self._reserved.taken_bytes:
            missing_bytes += self._reserved.taken_bytes.get((site.name, device.index), 0)
        return missing_bytes

    def has_room(self, site: Site) -> bool:
        """Whether enough devices there have room now."""
        found = 0
        for slot in site.slots.values():
            if self.missing_bytes(site, slot) <= 0:
                found += 1
        return found >= self._ranks

    def least_s(self, site: Site, room_s: float) -> float:
        """What a start there takes at least, if making room takes at least so long."""
        return self._startup(site, room_s)[0].total_s

    def weigh(self, site: Site, *, room_only: bool = False) -> Weighed | None:
        """The soonest way there; None if there is none. room_only: only devices that have room now."""
        clearings = self._devices(site, room_only=room_only)
        if clearings is None:
            return None
        leavers = tuple({one.instance.instance_id: one for c in clearings for one in c.leavers}.values())
        devices = tuple(sorted(c.device for c in clearings))
        startup, source, origin, load, sources = self._startup(site, max(c.seconds for c in clearings))
        option = Option(
            node=site.name,
            devices=devices,
            source=source,
            origin=origin,
            how=_how(leavers),
            startup=startup,
            displaced=sum(one.displaced for one in leavers),
        )
        order = (
            round(startup.total_s / RESOLUTION_S) * RESOLUTION_S,
            option.displaced,
            -sum(one.idle_ms for one in leavers),
            max(c.crowd for c in clearings),
            tuple(one.instance.instance_id for one in leavers),
            site.name,
            devices,
        )
        return Weighed(order, option, leavers, load, sources)

    def _devices(self, site: Site, *, room_only: bool) -> Sequence[Clearing] | None:
        """The devices to take there: all of one kind, those that have room the soonest."""
        chosen = self._cleared(site, room_only=True)
        return chosen if chosen is not None or room_only else self._cleared(site, room_only=False)

    def _cleared(self, site: Site, *, room_only: bool) -> Sequence[Clearing] | None:
        kinds: dict[DeviceKind, list[Clearing]] = {}
        for slot in site.slots.values() if room_only else self._promising(site):
            missing_bytes = self.missing_bytes(site, slot)
            if room_only and missing_bytes > 0:
                continue
            taken = self._reserved.taken.get((site.name, slot.device.index), 0)
            clearing = clear(slot, missing_bytes, taken, self._leaver)
            if clearing is not None:
                kinds.setdefault(slot.device.kind, []).append(clearing)
        sets = [nsmallest(self._ranks, found) for found in kinds.values() if len(found) >= self._ranks]
        return min(sets, key=lambda chosen: chosen[-1], default=None)

    def _promising(self, site: Site) -> list[Slot]:
        """Devices that could hold it at all; of more than are needed those that promise to be free first."""
        slots = [slot for slot in site.slots.values() if self._model.bytes_on(slot.device) <= slot.device.memory_bytes]
        return nsmallest(self._ranks + SPARE_DEVICES, slots, key=lambda slot: self._hold(site, slot))

    def _hold(self, site: Site, slot: Slot) -> tuple[bool, int, int, int, int]:
        """How much keeps it from being free: what starts, then what is in hand; of equals the one with the longest idle."""
        residents = [i for i in slot.residents.values() if not i.leaving]
        return (
            self.missing_bytes(site, slot) > 0,
            sum(i.state is not InstanceState.READY for i in residents),
            sum(i.running_tokens or i.running for i in residents),
            -max((self._cluster.idle_ms(i) for i in residents), default=0),
            slot.device.index,
        )

    def _startup(self, site: Site, room_s: float) -> tuple[Startup, Tier, str, LoadView, tuple[str, ...]]:
        """The soonest way to bring the weights there, by what is held there, by peers and by the model's own source."""
        model, whole_bytes = self._model, self._model.weight_bytes
        held_dram_bytes, held_ssd_bytes = site.model_bytes.get(model.model_id, (0, 0))
        dram_bytes = min(held_dram_bytes, whole_bytes)
        # Both tiers may hold the same part: what the larger of them has is there for certain.
        ssd_bytes = max(0, min(held_ssd_bytes, whole_bytes) - dram_bytes)
        rest_bytes = whole_bytes - dram_bytes - ssd_bytes
        peers = [peer for peer in self._givers() if peer != site.name][:PEERS_MAX] if rest_bytes else []
        tier = Tier.SSD if ssd_bytes else Tier.DRAM
        best: tuple[float, int, Startup, str] | None = None
        for number, peer in enumerate([*peers, ""]):
            if rest_bytes:
                tier = Tier.PEER if peer else Tier.REMOTE
            facts = StartFacts(
                node=site.name,
                model=model,
                engine=site.engine_state(model),
                dram_bytes=dram_bytes,
                ssd_bytes=ssd_bytes,
                peer=peer,
                queue_bytes=self._queue_bytes(site, tier, peer),
                room_s=room_s,
                ranks=self._ranks,
            )
            startup = self._cluster.estimates.startup(facts)
            if best is None or (startup.total_s, number) < best[:2]:
                best = (startup.total_s, number, startup, peer)
        assert best is not None
        _, _, startup, peer = best
        if rest_bytes:
            tier, origin = (Tier.PEER, peer) if peer else (Tier.REMOTE, facts.rest[1])
        else:
            origin = ""
        size_bytes = rest_bytes or ssd_bytes or whole_bytes
        waits_s = max(startup.queue_s, startup.room_s)
        load = LoadView(source=tier, origin=origin, size_bytes=size_bytes, wait_s=waits_s, load_s=startup.load_s)
        return startup, tier, origin, load, tuple(dict.fromkeys([peer, *peers])) if peer else ()

    def _queue_bytes(self, site: Site, tier: Tier, peer: str) -> int:
        """What still has to come on the same way first: of this node, or of the peer who gives it."""
        cluster, lane = self._cluster, LANES[tier]
        ahead = self._reserved.load_bytes[(site.name, lane)]
        for instance in site.loads.values():
            load = instance.load
            if load is not None and LANES.get(load.source) == lane:
                ahead += load.left_bytes(cluster.age_ms(instance))
        return max(ahead, self._given_bytes(peer)) if peer else ahead

    def _given_bytes(self, peer: str) -> int:
        """What a node still has to give to peers."""
        given = sum(
            i.load.left_bytes(self._cluster.age_ms(i)) for i in self._cluster.given_by(peer) if i.load is not None
        )
        return given + self._reserved.given[peer]

    def _givers(self) -> list[str]:
        """Nodes that hold all of the model and could give it, those that give least first."""
        if self._peers is None:
            whole_bytes = self._model.weight_bytes
            holders = self._cluster.holders.get(self._model.model_id, {})
            whole = [
                name
                for name, site in holders.items()
                if max(site.model_bytes[self._model.model_id]) >= whole_bytes
                and site.view is not None
                and not site.view.silent
            ]
            self._peers = nsmallest(PEERS_MAX + 1, whole, key=lambda name: (self._given_bytes(name), name))
        return self._peers


def _how(leavers: Sequence[Leaver]) -> How:
    """Of all who have to go: as long as one of them has work in hand that stays, nothing can be done but to wait for it."""
    if not leavers:
        return "free"
    if not all(one.certain for one in leavers):
        return "wait"
    hows = {one.how for one in leavers}
    return "migrate" if "migrate" in hows else "stop" if "stop" in hows else "wait"

"""Nodes worth weighing for a model: found by what it needs, without asking all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import nsmallest
from itertools import islice
from math import inf

from stoker_contracts.models import DeviceKind, ModelSpec
from stoker_policy.cluster import Cluster
from stoker_policy.leave import STOP_S
from stoker_policy.options import Weighed, Weighing
from stoker_policy.reserve import Reserved
from stoker_policy.sites import Site

HOLDERS_MAX = 6
"""Holders that are weighed of those with room, and of those without: who holds most in DRAM first, then on SSD."""
OTHERS_MAX = 4
"""Others of each sort."""
LOOK_MAX = 256
"""Entries of an index that are looked at for one sort."""
HOLDERS_PATIENCE, OTHERS_PATIENCE = 3, 1
"""Each sort comes in the order of what its nodes should come to, that of holders roughly: after so many that were no better than
what is known the others will not be."""

_KINDS = (DeviceKind.CUDA, DeviceKind.CPU, DeviceKind.UNKNOWN)


class Candidates:
    """Weighs nodes, each once: who holds the model, who has room, who could make some.

    Those who would have to make room are weighed only if they could be better than the best known were it made at once.
    """

    def __init__(self, cluster: Cluster, model: ModelSpec, reserved: Reserved, weighing: Weighing) -> None:
        self._cluster, self._model, self._reserved, self._weighing = cluster, model, reserved, weighing
        self._seen: set[str] = set()
        self._best_s = inf
        self._free = False
        self.found: list[Weighed] = []

    def weigh(self) -> list[Weighed]:
        """The best first."""
        holders = self._holders()
        self._weigh_room([site for site in holders if self._weighing.has_room(site)], HOLDERS_MAX, HOLDERS_PATIENCE)
        self._weigh_room(self._with_room(), OTHERS_MAX, OTHERS_PATIENCE)
        self._clear(self._being_cleared(), OTHERS_MAX, least_room_s=0.0)
        self._clear(holders, HOLDERS_MAX)
        if not self._free:
            self._clear(self._with_idle(), OTHERS_MAX)
            self._clear(self._roomiest(), OTHERS_MAX)
        return sorted(self.found, key=lambda one: one.order)

    def weigh_room(self) -> list[Weighed]:
        """The same of nodes that have room now, and only the best two of each sort: for those who have to move there."""
        self._weigh_room([site for site in self._holders() if self._weighing.has_room(site)], 2, 2)
        if not self._free:
            self._weigh_room(self._with_room(), 2, 2)
        return sorted(self.found, key=lambda one: one.order)

    def _weigh_room(self, sites: Iterable[Site], most: int, patience: int) -> None:
        """Of nodes with room."""
        for site in self._fresh(sites, most):
            one = self._weighing.weigh(site, room_only=True)
            if one is not None:
                patience -= one.option.startup.total_s >= self._best_s
                self._take(one)
                if patience <= 0:
                    return

    def _clear(self, sites: Iterable[Site], most: int, *, least_room_s: float = STOP_S) -> None:
        """Of nodes that have to make room. least_room_s: what that takes at least."""
        for site in self._fresh(sites, most):
            if self._weighing.least_s(site, least_room_s) < self._best_s:
                one = self._weighing.weigh(site)
                if one is not None:
                    self._take(one)

    def _take(self, one: Weighed) -> None:
        self.found.append(one)
        self._best_s = min(self._best_s, one.option.startup.total_s)
        self._free = self._free or one.option.how == "free"

    def _fresh(self, sites: Iterable[Site], most: int) -> Iterator[Site]:
        """Those where the model can start at all and that were not weighed yet."""
        for site in sites:
            if most <= 0:
                return
            if site.name not in self._seen and site.serves(self._model):
                self._seen.add(site.name)
                most -= 1
                yield site

    def _holders(self) -> list[Site]:
        model_id, whole_bytes = self._model.model_id, self._model.weight_bytes

        def order(site: Site) -> tuple[int, int, int, str]:
            dram_bytes, ssd_bytes = site.model_bytes[model_id]
            return (-min(dram_bytes, whole_bytes), -ssd_bytes, len(site.loads), site.name)

        holders = self._cluster.holders.get(model_id, {})
        return nsmallest(LOOK_MAX, (site for site in holders.values() if site.usable), key=order)

    def _with_room(self) -> Iterator[Site]:
        sites = self._cluster.sites
        for kind in _KINDS:
            names = self._cluster.shelves.fitting(kind, self._model.tensor_parallel, self._need_bytes(kind))
            yield from (site for name in names if self._weighing.has_room(site := sites[name]))

    def _being_cleared(self) -> Iterator[Site]:
        """Where somebody is leaving already."""
        cluster = self._cluster
        leaving = [cluster.instances[i] for i in cluster.leaving | self._reserved.leaving.keys()]
        first = nsmallest(LOOK_MAX, leaving, key=lambda i: (-(i.stop_asked_ms or 0), i.instance_id))
        return (cluster.sites[instance.node] for instance in first)

    def _with_idle(self) -> Iterator[Site]:
        return (self._cluster.sites[i.node] for i in islice(self._cluster.longest_idle(), LOOK_MAX))

    def _roomiest(self) -> Iterator[Site]:
        sites = self._cluster.sites
        for kind in _KINDS:
            names = self._cluster.shelves.roomiest(kind, self._model.tensor_parallel, self._need_bytes(kind))
            yield from (sites[name] for name in islice(names, LOOK_MAX))

    def _need_bytes(self, kind: DeviceKind) -> int:
        return self._model.cpu_bytes if kind is DeviceKind.CPU else self._model.gpu_bytes

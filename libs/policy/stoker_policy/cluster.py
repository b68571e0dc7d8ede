"""Everything that a decision depends on, kept as an index that news change one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import log2

from stoker_contracts.models import Device, DeviceKind, InstanceState, ModelSpec, Tier
from stoker_policy.architectures import Architectures
from stoker_policy.due import Due
from stoker_policy.estimate import Estimates
from stoker_policy.facts import DemandView, FailureView, HeldView, InstanceView, NodeView, View
from stoker_policy.idle import IdleTimes
from stoker_policy.instances import Instances
from stoker_policy.keep import quiet_ms
from stoker_policy.scaling import Scaling, scales
from stoker_policy.shelves import Shelves
from stoker_policy.sites import Site

__all__ = ["Cluster", "DemandView", "FailureView", "HeldView", "InstanceView", "NodeView", "View"]

_SLOWNESS_STEPS = 8
"""Per doubling: nodes whose ways to the models' sources differ by less than 9 % count as equally fast until they are weighed."""


class Cluster:
    """Facts, and where to find them. Equal facts, put in whatever order, give equal decisions.

    Facts carry ages as they were when they were put; `now_ms` says by how much they have aged since. It is whatever clock the
    owner has, of which only differences are used.
    estimates, idle_times: what was learned. Whoever owns the cluster lets them observe.
    migrates: whether running instances may be moved.
    """

    def __init__(
        self,
        *,
        nodes: Iterable[NodeView] = (),
        models: Iterable[ModelSpec] = (),
        instances: Iterable[InstanceView] = (),
        demands: Iterable[DemandView] = (),
        failures: Iterable[FailureView] = (),
        held: Iterable[HeldView] = (),
        estimates: Estimates | None = None,
        idle_times: IdleTimes | None = None,
        migrates: bool = False,
        now_ms: int = 0,
    ) -> None:
        self.now_ms = now_ms
        self.migrates = migrates
        self.estimates = Estimates() if estimates is None else estimates
        self.idle_times = IdleTimes() if idle_times is None else idle_times
        self.scaling = Scaling()
        self.architectures = Architectures()
        self.sites: dict[str, Site] = {}
        self.models: dict[str, ModelSpec] = {}
        self._index = Instances()
        self.instances = self._index.views
        self.leaving = self._index.leaving
        self.demands: dict[str, DemandView] = {}
        self.failures: dict[str, FailureView] = {}
        self.holders: dict[str, dict[str, Site]] = {}  # model → node → site, whose `model_bytes` says how much
        self.shapes: Counter[tuple[Device, ...]] = Counter()  # devices of one node → nodes that have them
        self._asked_ms: dict[str, int] = {}  # model → when its demand was put
        self._failed_ms: dict[str, int] = {}
        self._stops = Due()
        self._shelves = Shelves()
        self._moved: set[str] = set()  # nodes to shelve anew
        for model in models:
            self.put_model(model)
        for node in nodes:
            self.put_node(node)
        for instance in instances:
            self.put_instance(instance)
        for demand in demands:
            self.put_demand(demand)
        for failure in failures:
            self.put_failure(failure)
        for one in held:
            self.put_held(one.node, one.model_id, one.dram_bytes, one.ssd_bytes)

    # News

    def put_node(self, view: NodeView) -> None:
        site = self._site(view.name)
        before = site.view
        if before == view:
            return
        if before is not None and before.devices != view.devices:
            self._forget_shape(before)
        if before is None or before.devices != view.devices:
            self.shapes[_shape(view.devices)] += 1
        site.set_view(view)
        self._moved.add(view.name)
        self.architectures.put_node(view)

    def drop_node(self, name: str) -> None:
        """Its instances stay until they are dropped, and so does what its storage agent holds."""
        site = self.sites.get(name)
        if site is None or site.view is None:
            return
        self._forget_shape(site.view)
        site.set_view(None)
        self._moved.add(name)
        self.architectures.drop_node(name)
        self._tidy(site)

    def put_instance(self, view: InstanceView) -> None:
        before = self.instances.get(view.instance_id)
        if before is not None and (before.node != view.node or before.model_id != view.model_id):
            self.drop_instance(view.instance_id)
            before = None
        self._index.put(view, self.now_ms)
        self._site(view.node).put(view)
        if before is None or _seat(before) != _seat(view):
            self._moved.add(view.node)
        self._schedule(view)
        self._note(view.model_id)

    def drop_instance(self, instance_id: str) -> None:
        view = self.instances.get(instance_id)
        if view is None:
            return
        self._index.drop(instance_id)
        self._stops.drop(instance_id)
        site = self.sites[view.node]
        site.drop(view)
        self._moved.add(view.node)
        self._note(view.model_id)
        self._tidy(site)

    def put_model(self, model: ModelSpec) -> None:
        before = self.models.get(model.model_id)
        if before == model:
            return
        if before is not None:
            self.architectures.drop_model(before)
        self.models[model.model_id] = model
        self.architectures.put_model(model)
        self._reconsider(model.model_id)

    def drop_model(self, model_id: str) -> None:
        model = self.models.pop(model_id, None)
        if model is None:
            return
        self.architectures.drop_model(model)
        self.scaling.forget(model_id)
        self._reconsider(model_id)

    def put_demand(self, view: DemandView) -> None:
        """As an absolute value; nothing queued ends it."""
        if view.queued <= 0:
            self.drop_demand(view.model_id)
            return
        self.demands[view.model_id] = view
        self._asked_ms[view.model_id] = self.now_ms
        self._note(view.model_id)

    def drop_demand(self, model_id: str) -> None:
        if self.demands.pop(model_id, None) is not None:
            del self._asked_ms[model_id]
            self._note(model_id)

    def put_failure(self, view: FailureView) -> None:
        self.failures[view.model_id] = view
        self._failed_ms[view.model_id] = self.now_ms

    def drop_failure(self, model_id: str) -> None:
        if self.failures.pop(model_id, None) is not None:
            del self._failed_ms[model_id]

    def put_held(self, node: str, model_id: str, dram_bytes: int, ssd_bytes: int) -> None:
        """How much of a model a node's storage agent holds now; both 0: nothing."""
        site = self._site(node)
        if dram_bytes > 0 or ssd_bytes > 0:
            site.model_bytes[model_id] = (dram_bytes, ssd_bytes)
            self.holders.setdefault(model_id, {})[node] = site
        elif site.model_bytes.pop(model_id, None) is not None:
            del self.holders[model_id][node]
            if not self.holders[model_id]:
                del self.holders[model_id]
            self._tidy(site)

    def put_holdings(self, node: str, held: Mapping[str, tuple[int, int]]) -> None:
        """All that a node's storage agent holds: model → bytes in DRAM, bytes on SSD."""
        known = self._site(node).model_bytes
        for model_id in [m for m in known if m not in held]:
            self.put_held(node, model_id, 0, 0)
        for model_id, amounts in held.items():
            if known.get(model_id) != amounts:
                self.put_held(node, model_id, *amounts)

    # Look-ups

    def of_model(self, model_id: str) -> Iterable[InstanceView]:
        return self._index.of_model(model_id)

    def serving(self, model_id: str) -> list[InstanceView]:
        """Instances that serve or will, on nodes that are in use."""
        return [i for i in self.of_model(model_id) if i.live and not i.leaving and self.sites[i.node].in_use]

    def age_ms(self, view: InstanceView) -> int:
        return view.age_ms + self._since_put_ms(view)

    def idle_ms(self, view: InstanceView) -> int:
        return view.idle_ms + self._since_put_ms(view) if view.idle else view.idle_ms

    def stop_asked_ms(self, view: InstanceView) -> int | None:
        return None if view.stop_asked_ms is None else view.stop_asked_ms + self._since_put_ms(view)

    def wait_ms(self, model_id: str) -> int:
        """Of its oldest request in a queue; 0 without any."""
        demand = self.demands.get(model_id)
        return demand.oldest_wait_ms + self.now_ms - self._asked_ms[model_id] if demand else 0

    def failed_ms(self, view: FailureView) -> int:
        """Since the last of its failures."""
        return view.since_ms + self.now_ms - self._failed_ms[view.model_id]

    def longest_idle(self) -> Iterator[InstanceView]:
        """Idle instances, the longest idle first, ties by id."""
        return self._index.longest_idle()

    def to_review(self) -> list[InstanceView]:
        """Instances of which somebody must ask whether they should end, by id: of the others none can."""
        return [self.instances[instance_id] for instance_id in self._stops.over(self.now_ms)]

    def given_by(self, node: str) -> Iterable[InstanceView]:
        """Starts elsewhere that load from this node."""
        return self._index.given_by(node)

    @property
    def shelves(self) -> Shelves:
        """Nodes by the room they have, as of now."""
        for name in self._moved:
            self._shelve(name)
        self._moved.clear()
        return self._shelves

    # Upkeep

    def _site(self, name: str) -> Site:
        site = self.sites.get(name)
        if site is None:
            site = self.sites[name] = Site(name)
        return site

    def _tidy(self, site: Site) -> None:
        """A node of which nothing is known any more is forgotten."""
        if site.view is None and not site.instances and not site.model_bytes:
            del self.sites[site.name]

    def _since_put_ms(self, view: InstanceView) -> int:
        return self.now_ms - self._index.put_ms(view.instance_id)

    def _schedule(self, view: InstanceView) -> None:
        quiet = quiet_ms(view, self.models.get(view.model_id), self.idle_times)
        if quiet is None:
            self._stops.drop(view.instance_id)
        else:
            self._stops.put(view.instance_id, self._index.put_ms(view.instance_id) + quiet)

    def _reconsider(self, model_id: str) -> None:
        """Its model changed."""
        for view in self.of_model(model_id):
            self._schedule(view)
        self._note(model_id)

    def _note(self, model_id: str) -> None:
        model = self.models.get(model_id)
        if model is None or not scales(model):
            return
        demand = self.demands.get(model_id)
        serving = self.serving(model_id)
        self.scaling.note(
            model,
            self.now_ms,
            running=sum(i.running for i in serving),
            queued=demand.queued if demand else 0,
            ready=sum(1 for i in serving if i.state is InstanceState.READY),
        )

    def _forget_shape(self, view: NodeView) -> None:
        shape = _shape(view.devices)
        self.shapes[shape] -= 1
        if not self.shapes[shape]:
            del self.shapes[shape]

    def _shelve(self, name: str) -> None:
        site = self.sites.get(name)
        if site is None or not site.usable:
            self._shelves.drop(name)
            return
        free: dict[DeviceKind, list[tuple[int, int]]] = {}
        for slot in site.slots.values():
            free.setdefault(slot.device.kind, []).append((slot.free_bytes, len(slot.residents)))
        bytes_per_s = self.estimates.bandwidth(name, Tier.REMOTE).value
        slowness = round(-_SLOWNESS_STEPS * log2(max(1.0, bytes_per_s)))
        self._shelves.put(name, free, loads=len(site.loads), slowness=slowness)


def _shape(devices: Iterable[Device]) -> tuple[Device, ...]:
    """The devices of a node, but for what tells one of a kind from the other."""
    kinds = (Device(index=0, kind=d.kind, name="", memory_bytes=d.memory_bytes) for d in devices)
    return tuple(sorted(kinds, key=lambda d: (d.kind, d.memory_bytes)))


def _seat(view: InstanceView) -> tuple[object, ...]:
    """What of an instance changes how much room its node has, or how many loads it carries."""
    return (view.live, view.devices, view.gpu_bytes, view.load is None)

"""Stoker's policy: `stoker_policy` as the scheduler runs it, told of the simulated cluster as statuses would tell it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from stoker_contracts.models import Tier
from stoker_policy import Cluster, DemandView, InstanceView, Migrate, NodeView, Reject, Start, Stop, decide
from stoker_sim.cluster.orders import Begin, End, Move, Order, Refuse
from stoker_sim.cluster.shelves import Eviction

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.nodes import Node
    from stoker_sim.cluster.world import World

REFRESH_MAX = 64
"""Up to so many busy instances tell how far their requests have come before each decision that has to place something; of more,
what they said when their load changed last."""


class Stoker:
    """Knows of the machines what it sees: its estimates begin with the scheduler's own priors, and learn from starts and migrations."""

    name: ClassVar[str] = "stoker"
    tiers: ClassVar[frozenset[Tier]] = frozenset({Tier.DRAM, Tier.SSD})
    eviction: ClassVar[Eviction] = "worth"
    preloaded: ClassVar[bool] = True

    def __init__(self, nodes: Mapping[str, Node], lines: Mapping[str, Line], *, migrates: bool = True) -> None:
        prepared = tuple(sorted({line.spec.architecture for line in lines.values()}))
        self.cluster = Cluster(
            nodes=(
                NodeView(name=name, devices=tuple(s.device for s in node.seats), prepared=prepared)
                for name, node in nodes.items()
            ),
            models=(line.spec for line in lines.values()),
            migrates=migrates,
        )
        self._sizes = {name: line.spec.weight_bytes for name, line in lines.items()}
        self._changed: dict[str, Instance] = {}
        self._asked: dict[str, Line] = {}
        self._busy: dict[str, Instance] = {}

    def decide(self, world: World) -> Iterator[Order]:
        cluster = self.cluster
        cluster.now_ms = round(world.now_s * 1000)
        self._tell(world)
        for command in decide(cluster).commands:
            if isinstance(command, Start):
                line = world.lines[command.model_id]
                yield Begin(
                    line=line, node=command.node, devices=command.devices, givers=command.sources, load=command.load
                )
            elif isinstance(command, Stop):
                yield End(instance=self._instance(world, command.instance_id), only_if_idle=command.only_if_idle)
            elif isinstance(command, Migrate):
                instance = self._instance(world, command.instance_id)
                to = self._instance(world, command.to_instance) if command.to_instance else None
                yield Move(instance=instance, to=to, node=command.node, devices=command.devices)
            elif isinstance(command, Reject):
                yield Refuse(line=world.lines[command.model_id])

    # News

    def held(self, node: str, name: str, in_dram: bool, on_ssd: bool) -> None:
        size_bytes = self._sizes[name]
        self.cluster.put_held(node, name, size_bytes if in_dram else 0, size_bytes if on_ssd else 0)

    def changed(self, instance: Instance) -> None:
        self._changed[instance.instance_id] = instance
        if instance.running:
            self._busy[instance.instance_id] = instance
        else:
            self._busy.pop(instance.instance_id, None)

    def gone(self, instance: Instance) -> None:
        self._changed.pop(instance.instance_id, None)
        self._busy.pop(instance.instance_id, None)
        self.cluster.drop_instance(instance.instance_id)

    def asked(self, line: Line) -> None:
        self._asked[line.name] = line

    def came_back(self, line: Line, idle_s: float) -> None:
        self.cluster.idle_times.observe(line.name, idle_s)

    def ready(self, instance: Instance) -> None:
        assert instance.seen is not None
        self.cluster.estimates.observe_start(instance.seen)

    def moved(self, node: str, tokens: int, seconds: float) -> None:
        self.cluster.estimates.observe_migration(node, tokens, seconds)

    def finished(self, line: Line, tokens: int) -> None:
        self.cluster.estimates.observe_output(line.name, tokens)

    # Inside

    def _tell(self, world: World) -> None:
        """What changed since the last decision, as of now."""
        if world.waiting and len(self._busy) <= REFRESH_MAX:
            self._changed.update(self._busy)
        for instance in self._changed.values():
            self.cluster.put_instance(_view(instance, world.now_s))
        self._changed.clear()
        for name, line in self._asked.items():
            oldest_ms = round((world.now_s - line.waiting[0].waits_since_s) * 1000) if line.waiting else 0
            self.cluster.put_demand(DemandView(model_id=name, queued=len(line.waiting), oldest_wait_ms=oldest_ms))
        self._asked.clear()

    def _instance(self, world: World, instance_id: str) -> Instance:
        view = self.cluster.instances[instance_id]
        return world.lines[view.model_id].instances[instance_id]


def _view(instance: Instance, now_s: float) -> InstanceView:
    running = instance.running.values()
    made = [request.tokens_at(now_s) for request in running]
    asked_s = instance.stop_asked_s
    return InstanceView(
        instance_id=instance.instance_id,
        model_id=instance.line.name,
        node=instance.node.name,
        devices=instance.devices,
        state=instance.state,
        gpu_bytes=instance.line.spec.gpu_bytes,
        age_ms=round((now_s - instance.decided_s) * 1000),
        load=instance.load,
        running=len(running) + instance.kept,
        running_tokens=sum(request.prompt_tokens for request in running) + sum(made),
        generated_tokens=min(made, default=0),
        token_s=instance.token_s,
        idle_ms=round((now_s - instance.idle_since_s) * 1000),
        stop_asked_ms=None if asked_s is None else round((now_s - asked_s) * 1000),
        stops=instance.stops,
    )

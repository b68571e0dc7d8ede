"""ServerlessLLM's own rules, and preemption in their place.

Source: Fu et al., "ServerlessLLM: Low-Latency Serverless Inference for Large Language Models", OSDI 2024, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from stoker_contracts.models import InstanceState, Tier
from stoker_sim.cluster.greedy import Cleared, Greedy, clear
from stoker_sim.cluster.orders import Begin, Move
from stoker_sim.cluster.shelves import Eviction

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.nodes import Node
    from stoker_sim.cluster.world import World


class Elsewhere(NamedTuple):
    """Where an instance's requests could go on. seconds: until they do."""

    seconds: float
    to: Instance | None
    node: str
    devices: tuple[int, ...]


class ServerlessLLM(Greedy):
    """The server with the least q + n/b, where devices are free or idle, or are freed by moving one instance away: then its
    model's load at the destination and a (t_in + t_out) + b come first.

    Its estimates are exact: it knows the simulation's bandwidths, queues, and speed of prefills. Nothing comes from peers.
    """

    name: ClassVar[str] = "serverlessllm"
    tiers: ClassVar[frozenset[Tier]] = frozenset({Tier.DRAM, Tier.SSD})
    eviction: ClassVar[Eviction] = "lru"
    preloaded: ClassVar[bool] = True

    def place(self, world: World, line: Line) -> Begin | Move | None:
        stop_s = world.physics.stop_s
        best: tuple[float, int, str] | None = None
        found: Cleared | None = None
        expected: dict[str, float] = {}
        for node in world.nodes.values():
            expected[node.name] = node.expected_load_s(line, world.now_s)
            cleared = clear(node, line)
            if cleared is not None:
                order = (expected[node.name] + (stop_s if cleared.evicts else 0.0), len(cleared.evicts), node.name)
                if best is None or order < best:
                    best, found = order, cleared
        if best is None or found is None:
            return None  # nor could anybody move anywhere
        quicker = self.displace(world, line, expected, best[0])
        if quicker is not None:
            return quicker
        return Begin(line=line, node=best[2], devices=found.devices, evicts=found.evicts)

    def displace(self, world: World, line: Line, expected: dict[str, float], limit_s: float) -> Begin | Move | None:
        """Move somebody away, if that is quicker than limit_s."""
        best: tuple[float, str] | None = None
        move: Move | None = None
        for instance in displaceable(world, line, expected, limit_s):
            elsewhere = self._elsewhere(world, instance)
            if elsewhere is None:
                continue
            tokens = sum(r.prompt_tokens + r.tokens_at(world.now_s) for r in instance.running.values())
            moved_s = elsewhere.seconds + instance.prefill_s(tokens) + world.physics.handoff_s + world.physics.stop_s
            order = (moved_s + expected[instance.node.name], instance.instance_id)
            if order[0] < limit_s and (best is None or order < best):
                best = order
                move = Move(
                    instance=instance, to=elsewhere.to, node=elsewhere.node, devices=elsewhere.devices, then=line
                )
        return move

    def _elsewhere(self, world: World, instance: Instance) -> Elsewhere | None:
        line = instance.line
        for other in line.instances.values():
            if other is not instance and other.room >= len(instance.running):
                return Elsewhere(0.0, other, "", ())
        best: Elsewhere | None = None
        for node in world.nodes.values():
            cleared = clear(node, line, without=instance.devices if node is instance.node else ())
            if cleared is None or cleared.evicts:
                continue
            seconds = node.expected_load_s(line, world.now_s) + node.loader.engine_start_s
            if best is None or (seconds, node.name) < (best.seconds, best.node):
                best = Elsewhere(seconds, None, node.name, cleared.devices)
        return best


class Shepherd(ServerlessLLM):
    """Shepherd*, as the paper compares: the same estimates, but who runs where a model would be quicker is preempted.

    What was preempted keeps its tokens, waits before all others, and is preempted only once.
    """

    name: ClassVar[str] = "shepherd"

    def displace(self, world: World, line: Line, expected: dict[str, float], limit_s: float) -> Begin | Move | None:
        best: tuple[float, float, str] | None = None
        victim: Instance | None = None
        for instance in displaceable(world, line, expected, limit_s):
            if any(request.preempted for request in instance.running.values()):
                continue
            seconds = expected[instance.node.name] + world.physics.stop_s
            order = (seconds, -instance.ready_s, instance.instance_id)
            if seconds < limit_s and (best is None or order < best):
                best, victim = order, instance
        if victim is None:
            return None
        return Begin(line=line, node=victim.node.name, devices=victim.devices, evicts=(victim,))


def displaceable(world: World, line: Line, expected: dict[str, float], limit_s: float) -> Iterator[Instance]:
    """Busy instances without which the model would have room, on nodes where its load alone is quicker than limit_s."""
    for node in world.nodes.values():
        if expected[node.name] < limit_s:
            yield from (i for i in node.instances.values() if _frees(i, line, node))


def _frees(instance: Instance, line: Line, node: Node) -> bool:
    if instance.state is not InstanceState.READY or instance.leaving or instance.kept or not instance.running:
        return False
    if instance.line is line or len(instance.devices) != max(1, line.spec.tensor_parallel):
        return False
    return all(
        node.seats[index].free_bytes + instance.line.spec.bytes_on(node.seats[index].device)
        >= line.spec.bytes_on(node.seats[index].device)
        for index in instance.devices
    )

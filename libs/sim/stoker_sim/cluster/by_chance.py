"""Policies that do not look where a model lies: any GPU that is available."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stoker_contracts.models import Tier
from stoker_sim.cluster.greedy import Greedy, evictable
from stoker_sim.cluster.orders import Begin
from stoker_sim.cluster.shelves import Eviction
from stoker_sim.dice import Dice

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.nodes import Node
    from stoker_sim.cluster.world import World


class AtRandom(Greedy):
    """Nothing is kept on nodes: every start downloads its model, as Ray Serve does in the paper."""

    name: ClassVar[str] = "random"
    tiers: ClassVar[frozenset[Tier]] = frozenset()
    eviction: ClassVar[Eviction] = "lru"
    preloaded: ClassVar[bool] = False

    def __init__(self, dice: Dice) -> None:
        self._dice = dice

    def place(self, world: World, line: Line) -> Begin | None:
        """Any free devices, or else any that are idle; of several ranks all on one node."""
        ranks = max(1, line.spec.tensor_parallel)
        available: list[tuple[Node, list[tuple[int, tuple[Instance, ...]]]]] = []
        for node in world.nodes.values():
            seats = [(s.device.index, found) for s in node.seats if (found := evictable(s, line)) is not None]
            free = [seat for seat in seats if not seat[1]]
            available.append((node, free if len(free) >= ranks else seats))
        enough = [(node, seats) for node, seats in available if len(seats) >= ranks]
        untouched = [(node, seats) for node, seats in enough if not seats[0][1]]
        among = untouched or enough
        if not among:
            return None
        # Each device is as likely as any other.
        node, seats = self._dice.choice([one for one in among for _ in one[1]])
        chosen = [seats.pop(self._dice.below(len(seats))) for _ in range(ranks)]
        evicts = {i.instance_id: i for _, found in chosen for i in found}
        devices = tuple(sorted(index for index, _ in chosen))
        return Begin(line=line, node=node.name, devices=devices, evicts=tuple(evicts.values()))


class Cached(AtRandom):
    """The same, with what was loaded kept in the node's memory and on its SSD, least recently used out first."""

    name: ClassVar[str] = "cache"
    tiers: ClassVar[frozenset[Tier]] = frozenset({Tier.DRAM, Tier.SSD})
    preloaded: ClassVar[bool] = True

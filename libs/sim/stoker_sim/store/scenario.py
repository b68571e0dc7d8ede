"""What befalls a world: drawn from the seed, first with faults and then without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stoker_contracts.control import PrefetchModel
from stoker_contracts.models import Tier
from stoker_sim.dice import Dice
from stoker_sim.store import faults
from stoker_sim.store.checks import check_empty, check_resting
from stoker_sim.store.instance import Instance
from stoker_sim.store.node import Node, Shape
from stoker_sim.store.world import World

STEPS = 40
MODELS_MAX = 6
SETTLE_S = 150.0
"""After faults stop: a silent disk, a suspected peer and six tries of a source take their time; then there are none."""
START_S = 240.0
SILENT_S = 90.0
DOOMS = ("before fill", "fill", "free", "note", "noted", "publish")

WEIGHTS = {
    "lease": 30,
    "burst": 6,
    "kill instance": 6,
    "evict": 6,
    "prefetch": 10,
    "cancel": 3,
    "deploy": 6,
    "delete": 2,
    "kill agent": 5,
    "doom agent": 6,
    "stop agent": 3,
    "start agent": 20,
    "kill worker": 2,
    "lose power": 1,
    "rot": 3,
    "source away": 2,
    "source back": 8,
    "database away": 2,
    "database back": 8,
}
"""How often each thing happens, of all that do."""


@dataclass(frozen=True)
class Result:
    """trace: the same for the same seed.  virtual_s: how long it took there."""

    seed: int
    trace: str
    steps: int
    virtual_s: float
    outcomes: dict[str, int]
    did: dict[str, int]


def shapes(dice: Dice) -> list[Shape]:
    """Pools of a few chunks and disks for a few models, so that nothing fits."""
    made = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        ssd_bytes = dice.between(20_000, 150_000)
        made.append(
            Shape(
                pool_chunks=dice.between(4, 12),
                ssd_bytes=ssd_bytes,
                disk_bytes=ssd_bytes // 2 if dice.chance(0.15) else 2 * ssd_bytes,
                fetches_at_once=dice.between(1, 5),
                wait_s=dice.choice((1.0, 5.0, 30.0)),
                scrub_bytes_per_s=dice.choice((0, 5_000, 100_000)),
            )
        )
    return made


def run_seed(seed: int, *, steps: int = STEPS, weights: Mapping[str, int] | None = None) -> Result:
    """weights: of what befalls it, where they shall differ from WEIGHTS. Raises Flaw."""
    dice = Dice(seed, "scenario")
    world = World(seed, shapes(dice))
    try:
        world.set_faults(faults.drawn(dice.child("faults")))
        Scenario(world, dice, {**WEIGHTS, **(weights or {})}).befall(steps)
        recover(world)
        clear(world)
        return Result(
            seed, world.loop.trace, world.loop.steps, world.loop.time(), dict(world.outcomes), dict(world.did)
        )
    finally:
        world.close()


class Scenario:
    """One thing after another."""

    def __init__(self, world: World, dice: Dice, weights: Mapping[str, int]) -> None:
        self.world, self.dice = world, dice
        self.shards_max = dice.between(2, 9)
        self._instances: list[Instance] = []
        self._acts = dict(weights)
        if dice.chance(0.3):  # agents that live long do what others never come to
            for act in ("kill agent", "doom agent", "stop agent", "kill worker", "lose power"):
                self._acts[act] = 0

    def befall(self, steps: int) -> None:
        for _ in range(self.dice.between(1, 3)):
            self.world.deploy(self.shards_max)
        self.world.run_for(0.5)
        lots = [act for act, weight in self._acts.items() for _ in range(weight)]
        for _ in range(steps):
            act = self.dice.choice(lots)
            self.world.did[act] += 1
            self.world.loop.mark(act)
            self._act(act, self.dice.choice(self.world.nodes))
            self.world.run_for(self.dice.delay_s(self.dice.choice((0.0, 0.002, 0.02, 0.2, 2.0))))
        for instance in self._instances:
            self.world.outcomes[instance.outcome if instance.outcome is not None else "starts"] += 1

    def _act(self, act: str, node: Node) -> None:
        world, dice = self.world, self.dice
        deployed = world.registry.deployed
        match act:
            case "lease" if deployed:
                self._instances.append(world.lease(node, dice.choice(deployed)))
            case "burst" if deployed:
                model_id = dice.choice(deployed)
                for each in world.nodes:
                    self._instances += [world.lease(each, model_id) for _ in range(dice.between(1, 3))]
            case "kill instance":
                starting = [instance for instance in self._instances if instance.outcome is None]
                if starting:
                    dice.choice(starting).process.kill()
            case "evict" if deployed:
                world.evict(node, dice.choice(deployed), dice.choice((Tier.SSD, Tier.DRAM)))
            case "prefetch" if deployed:
                world.prefetch(node, self._order(dice.choice(deployed)))
            case "cancel" if deployed:
                world.cancel(node, dice.choice(deployed))
            case "deploy" if len(deployed) < MODELS_MAX and not world.database_away:
                world.deploy(self.shards_max)
            case "delete" if len(deployed) > 1 and not world.database_away:
                world.delete(dice.choice(deployed))
            case "kill agent" if node.agent is not None:
                node.agent.process.kill()
            case "doom agent" if node.agent is not None:
                node.agent.process.doom = dice.choice(DOOMS)
            case "stop agent":
                world.stop(node)
            case "start agent":
                for each in world.nodes:
                    world.start(each)
            case "kill worker":
                node.worker.kill()
            case "lose power":
                node.lose_power()
            case "rot":
                node.disk.rot()
            case "source away" | "source back":
                world.source.away = act == "source away"
            case "database away" | "database back":
                world.set_database(away=act == "database away")

    def _order(self, model_id: str) -> PrefetchModel:
        dice = self.dice
        return PrefetchModel(
            model_id=model_id,
            tier=dice.choice((Tier.SSD, Tier.DRAM)),
            term=1,
            priority=dice.between(0, 2),
            budget_ms=dice.choice((0, 0, 100, 5000)),
            sources=tuple(node.name for node in self.world.nodes if dice.chance(0.3)),
        )


def all_run(world: World) -> bool:
    """One that stops in order has to end before the next begins."""
    for node in world.nodes:
        world.start(node)
    return all(node.name in world.agents and not node.agent.stop.is_set() for node in world.nodes if node.agent)


def recover(world: World) -> None:
    """Faults stop: whatever starts ends, and then every model starts everywhere."""
    world.heal()
    world.run_until(lambda: all_run(world), SILENT_S, "all agents run")
    world.run_until(lambda: not any(node.worker.loading for node in world.nodes), SETTLE_S, "instances end")
    world.run_for(SILENT_S)
    world.heal()  # a disk that was silent until now took chunks with it
    world.run_until(lambda: all_run(world), SILENT_S, "all agents run again")
    waiting = {(node.name, model_id) for node in world.nodes for model_id in world.registry.deployed}
    starting: dict[tuple[str, str], Instance] = {}

    def all_started() -> bool:
        for node in world.nodes:
            for model_id in world.registry.deployed:
                key = (node.name, model_id)
                instance = starting.get(key)
                if instance is not None and instance.outcome == "":
                    waiting.discard(key)
                elif instance is None or instance.outcome is not None:
                    starting[key] = world.lease(node, model_id)
        return not waiting

    world.run_until(all_started, START_S, "every model starts on every node")
    world.run_for(SETTLE_S)
    for agent in world.agents.values():
        check_resting(agent, world.flaws)
    world.check()


def clear(world: World) -> None:
    """All models are deleted, and the agents stop: nothing is left."""
    for model_id in list(world.registry.deployed):
        world.delete(model_id)
    world.run_for(SETTLE_S)
    for agent in world.agents.values():
        check_resting(agent, world.flaws)
        check_empty(agent, world.flaws)
    world.check()
    for node in world.nodes:
        world.stop(node)
    world.run_until(lambda: not any(node.agent for node in world.nodes), SILENT_S, "agents stop")

"""A cluster of simulated nodes, and what can be done to it. Nothing happens between two calls of `run_for`."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from stoker_contracts.control import PrefetchModel
from stoker_contracts.models import Tier
from stoker_core.errors import StokerError
from stoker_sim.dice import Dice
from stoker_sim.loop import SimClock, SimLoop
from stoker_sim.store.agent import Agent
from stoker_sim.store.catalogue import Registry
from stoker_sim.store.checks import check_always
from stoker_sim.store.contents import Library
from stoker_sim.store.disk import SimDisk
from stoker_sim.store.faults import NONE, Faults
from stoker_sim.store.flaws import Flaws
from stoker_sim.store.instance import Instance
from stoker_sim.store.node import Node, Shape
from stoker_sim.store.peers import Wire
from stoker_sim.store.source import SourceState

T = TypeVar("T")

LEFT_S = 1.0
"""After an agent ended, look-ups that it had begun may take so long to end."""
WATCH_EVERY = 8
"""Steps of the loop from one look at all invariants to the next."""


class World:
    """Nodes of the given shapes, without models; their agents start at once. `close` it."""

    def __init__(self, seed: int, shapes: list[Shape]) -> None:
        self.loop, self.dice, self.flaws = SimLoop(), Dice(seed), Flaws()
        self.clock = SimClock(self.loop)
        self.library = Library(self.dice.child("library"))
        self.registry = Registry(self.library, self.clock)
        self.source = SourceState(self.library)
        self.agents: dict[str, Agent] = {}
        self.wire = Wire(self.loop, self.agents)
        self.outcomes: Counter[str] = Counter()
        self.did: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._looked = 0
        self.database_away = False
        self.nodes: list[Node] = []
        for index, shape in enumerate(shapes):
            name, dice = f"n{index}", self.dice.child(f"node {index}")
            disk = SimDisk(Path("/sim") / name, shape.disk_bytes, dice.child("disk"), self.flaws)
            node = Node(name, shape, disk, self.loop, dice)
            node.came_up = self._came_up
            self.nodes.append(node)
        self.loop.watch = self._watch
        for node in self.nodes:
            self.start(node)

    # Time.

    def run_for(self, seconds: float) -> None:
        """Raises Flaw if something happens that must not."""
        self.loop.run_for(seconds)
        self.check()

    def run_until(self, holds: Callable[[], bool], within_s: float, what: str) -> None:
        """Raises Flaw if it does not hold within that time."""
        deadline_s = self.loop.time() + within_s
        while not holds():
            if self.loop.time() >= deadline_s:
                self.flaws.add(f"not within {within_s:g} s: {what}")
            self.run_for(0.05)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        found = self.loop.run(work)
        self.check()
        return found

    def check(self) -> None:
        for agent in self.agents.values():
            check_always(agent, self.flaws)
        self.flaws.check()

    # Faults.

    def set_faults(self, faults: Faults) -> None:
        self.source.faults = self.wire.faults = faults
        for node in self.nodes:
            node.disk.faults = faults

    def set_database(self, *, away: bool) -> None:
        self.database_away = away
        self.registry.away(away)

    def heal(self) -> None:
        """No faults any more, and everything that may run does."""
        self.set_faults(NONE)
        self.source.away = False
        self.set_database(away=False)
        for node in self.nodes:
            agent = node.agent
            if agent is not None:
                agent.process.doom = ""
                if agent.up and agent.memory.lost:  # only the next one can use those chunks
                    agent.process.kill()
            if not node.worker.alive:
                node.new_worker()
            self.start(node)

    # Agents.

    def start(self, node: Node) -> None:
        """No-op while it runs."""
        if node.agent is not None:
            return
        name = f"agent {node.name} {self._number(node.name)}"
        agent = node.agent = Agent(
            node, self.loop, self.registry, self.source, self.wire, self.dice.child(name), self.flaws
        )

        def gone() -> None:
            if node.agent is agent:
                node.agent = None
            if self.agents.get(node.name) is agent:
                del self.agents[node.name]

        async def run() -> None:
            try:
                await agent.run()
            except StokerError as error:
                self.did[f"not started: {error.code}"] += 1
            except Exception as error:  # noqa: BLE001 - an agent ends for no other reason
                leaf = _leaf(error)
                at = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(leaf.__traceback__)]
                self.flaws.add(f"the agent of {node.name} ended: {leaf!r} at {' '.join(at[-8:])}")
            gone()
            self.loop.later(LEFT_S, lambda: self._left(agent))

        agent.process.on_death(gone)
        self.loop.spawn(agent.process, run(), name=name)

    def stop(self, node: Node) -> None:
        """In order, which takes its time."""
        if node.agent is not None:
            node.agent.stop.set()

    def _left(self, agent: Agent) -> None:
        left = [task.get_name() for task in self.loop.tasks_of(agent.process)]
        self.flaws.require(not left, f"the agent of {agent.node.name} left {left}")

    def _came_up(self, agent: Agent) -> None:
        self.agents[agent.node.name] = agent

    # Use.

    def lease(self, node: Node, model_id: str) -> Instance:
        """An instance starts on that node."""
        instance_id = f"{node.name}-i{self._number('instance')}"
        agent = self.agents.get(node.name)
        instance = Instance(
            instance_id,
            self.library.by_id[model_id],
            agent.door if agent is not None else None,
            self.loop,
            self.dice.child(instance_id),
            self.flaws,
        )
        if not node.worker.alive:
            node.new_worker()
        node.worker.start(instance)
        return instance

    def deploy(self, shards_max: int) -> str:
        contents = self.library.make(shards_max)
        self.run(self.registry.deploy(contents))
        return contents.model_id

    def delete(self, model_id: str) -> None:
        self.run(self.registry.delete(model_id))

    def prefetch(self, node: Node, order: PrefetchModel) -> None:
        if node.name in self.agents:
            self.agents[node.name].order(lambda agent: agent.prefetcher.order(order))

    def cancel(self, node: Node, model_id: str) -> None:
        if node.name in self.agents:
            self.agents[node.name].order(lambda agent: agent.prefetcher.cancel(model_id))

    def evict(self, node: Node, model_id: str, tier: Tier | None) -> None:
        agent = self.agents.get(node.name)
        if agent is None:
            return

        async def drop() -> None:
            try:
                await agent.tiers.drop(model_id, "ordered", tier=tier)
            except StokerError as error:
                self.did[f"not dropped: {error.code}"] += 1

        self.loop.spawn(agent.process, drop(), name=f"drop {model_id}")

    # The end.

    def close(self) -> None:
        self.loop.watch = None
        for node in self.nodes:
            if node.agent is not None:
                node.agent.process.kill()
            node.worker.kill()
        self.loop.close()
        for node in self.nodes:
            node.close()

    def _number(self, what: str) -> int:
        self._numbers[what] += 1
        return self._numbers[what]

    def _watch(self) -> None:
        self._looked += 1
        if self._looked % WATCH_EVERY == 0:
            for agent in self.agents.values():
                check_always(agent, self.flaws)
        if self.flaws.found:
            self.flaws.check()


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

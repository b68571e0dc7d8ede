"""A machine: its disk, its worker with instances that start, and the storage agent that runs now, if one does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stoker_sim.dice import Dice
from stoker_sim.loop import SimLoop
from stoker_sim.store.disk import SimDisk
from stoker_sim.store.instance import Instance
from stoker_sim.store.pool import SimPool
from stoker_storeagent.table import PoolTable

if TYPE_CHECKING:
    from stoker_sim.store.agent import Agent

TOLD_S = 0.01


@dataclass(frozen=True)
class Shape:
    """disk_bytes: of the file system; less than the tier's budget on some nodes."""

    pool_chunks: int
    ssd_bytes: int
    disk_bytes: int
    fetches_at_once: int
    wait_s: float
    scrub_bytes_per_s: int


class _Closes(Protocol):
    def close(self) -> None: ...


class Worker:
    """Keeps the pool for the next agent, and knows which instances start. It dies with all of them."""

    def __init__(self, loop: SimLoop, dice: Dice) -> None:
        self._loop, self._dice = loop, dice
        self.alive = True
        self.kept: tuple[SimPool, PoolTable] | None = None
        self.loading: set[str] = set()
        self.instances: dict[str, Instance] = {}
        self._agent: asyncio.Queue[str] | None = None

    def keep(self, pool: SimPool, table: PoolTable) -> None:
        if self.alive:
            self.kept = (pool, table)

    def connected(self) -> asyncio.Queue[str]:
        """By an agent, in the place of the one before: it hears from now on of instances that start no more."""
        self._agent = asyncio.Queue()
        return self._agent

    def start(self, instance: Instance) -> None:
        self.loading.add(instance.instance_id)
        self.instances[instance.instance_id] = instance
        instance.start(lambda: self._ended(instance))

    def _ended(self, instance: Instance) -> None:
        self.loading.discard(instance.instance_id)
        self.instances.pop(instance.instance_id, None)
        told = self._agent
        if told is not None:
            self._loop.later(self._dice.delay_s(TOLD_S), lambda: told.put_nowait(instance.instance_id))

    def kill(self) -> None:
        self.alive = False
        self._agent = self.kept = None
        for instance in list(self.instances.values()):
            instance.process.kill()


class Node:
    """agent: the one that runs now, or starts, or stops.  came_up: told once it has opened its tiers."""

    def __init__(self, name: str, shape: Shape, disk: SimDisk, loop: SimLoop, dice: Dice) -> None:
        self.name, self.shape, self.disk = name, shape, disk
        self._loop, self._dice = loop, dice
        self.worker = Worker(loop, dice.child("worker 0"))
        self._workers = 1
        self.agent: Agent | None = None
        self.came_up: Callable[[Agent], None] = lambda _: None
        self._opened: list[_Closes] = []

    def opened(self, what: _Closes) -> None:
        """It has a descriptor, to be closed at the end of the world."""
        self._opened.append(what)

    def new_worker(self) -> None:
        self.worker.kill()
        self.worker = Worker(self._loop, self._dice.child(f"worker {self._workers}"))
        self._workers += 1

    def lose_power(self) -> None:
        if self.agent is not None:
            self.agent.process.kill()
        self.new_worker()
        self.disk.lose_power()

    def close(self) -> None:
        for what in reversed(self._opened):
            what.close()
        self._opened.clear()

"""A leader on the memory bus and database, with a clock that stands still unless told, turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.support.fake_worker import FakeWorker

from stoker_bus.events import EventPublisher
from stoker_bus.memory import MemoryBroker, MemoryBus
from stoker_bus.port import send
from stoker_contracts import subjects
from stoker_contracts.control import Demand
from stoker_contracts.models import InstanceState, ModelSpec
from stoker_core.clock import ManualClock
from stoker_core.ids import SequentialIds
from stoker_db.memory import MemoryDatabase, MemoryLeadership
from stoker_db.ports import InstanceRow
from stoker_scheduler.loops import Leader
from stoker_scheduler.settings import SchedulerSettings

SETTINGS = SchedulerSettings(node="s1", command_timeout_s=0.01)


async def settle() -> None:
    """Let everybody act on what was sent, until nothing more can follow at this moment."""
    for _ in range(100):
        await asyncio.sleep(0)


class World:
    """What outlives a leader: time, the bus, the database, and the workers."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(self.clock)
        self.database = MemoryDatabase(self.clock)
        self.ids = SequentialIds()

    def worker(self, node: str = "n1", *, start_s: float = 0.0, **fields: object) -> FakeWorker:
        return FakeWorker(self.broker.connect(), node, clock=self.clock, start_s=start_s, **fields)  # type: ignore[arg-type]

    async def register(self, *models: ModelSpec) -> None:
        for model in models:
            await self.database.models.add(model, [])

    async def rows(self) -> list[InstanceRow]:
        """Oldest first."""
        return sorted(await self.database.instances.recent(), key=lambda r: r.instance_id)

    @asynccontextmanager
    async def leader(self, settings: SchedulerSettings = SETTINGS) -> AsyncIterator[Rig]:
        """Lead, with every node already told the term."""
        leadership = self.database.leadership()
        leader_id = self.ids.new("scheduler")
        term = await leadership.acquire(leader_id)
        assert term is not None
        bus = self.broker.connect()
        leader = Leader(
            settings,
            term=term,
            leader_id=leader_id,
            bus=bus,
            database=self.database,
            leadership=leadership,
            events=EventPublisher(bus, service="scheduler", name="s1", boot_id="b", clock=self.clock, ids=self.ids),
            clock=self.clock,
            ids=self.ids,
        )
        await leader.begin()
        orders = asyncio.create_task(leader.orders.run())
        rig = Rig(self, leader, leadership, bus, orders)
        try:
            await rig.turn()
            yield rig
        finally:
            orders.cancel()
            await asyncio.gather(orders, return_exceptions=True)
            await bus.close()
            await leadership.release()


class Rig:
    """One leader and its loops, each turned by hand."""

    def __init__(
        self, world: World, leader: Leader, leadership: MemoryLeadership, bus: MemoryBus, orders: asyncio.Task[None]
    ) -> None:
        self.world, self.leader, self.leadership, self.bus, self.orders = world, leader, leadership, bus, orders

    async def turn(self) -> None:
        """Every loop once, and whatever follows from it."""
        await settle()
        await self.leader.announce()
        await settle()
        await self.leader.refresh_models()
        await self.leader.reconcile()
        await self.leader.decide()
        await self.leader.drains.turn()
        await settle()
        await self.leader.reconcile()
        await self.leader.explanations.write()

    async def pass_time(self, seconds: float) -> None:
        """In steps of a quarter of a second, as the loops would see it."""
        for _ in range(round(seconds * 4)):
            self.world.clock.advance(0.25)
            await self.turn()

    async def want(self, *model_ids: str, queued: int = 1) -> None:
        for model_id in model_ids:
            demand = Demand(gateway_id="g1", model_id=model_id, queued=queued, oldest_wait_ms=0)
            await send(self.bus, subjects.SCHEDULER_DEMAND, demand)
        await settle()

    async def demand(self, *model_ids: str) -> None:
        """Demand, and the decision that follows."""
        await self.want(*model_ids)
        await self.turn()


def states(rows: Sequence[InstanceRow]) -> list[tuple[str, InstanceState, InstanceState]]:
    """(model, desired, actual) of each."""
    return [(r.model_id, r.desired, r.actual) for r in rows]

"""A prefetcher that runs, over tiers in which a load goes on until a test ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from tests.support.storeagent_fakes import Told
from tests.support.virtual_time import LoopClock, others, steps

from stoker_contracts.control import HeldModel, PrefetchModel
from stoker_contracts.events import TIER_PREFETCH_CANCELLED, TIER_PREFETCH_DONE, TIER_PREFETCH_FAILED
from stoker_contracts.models import Tier
from stoker_core.errors import StokerError
from stoker_storeagent.prefetch import Prefetcher
from stoker_storeagent.slots import Turn

OUTCOMES = (TIER_PREFETCH_DONE, TIER_PREFETCH_FAILED, TIER_PREFETCH_CANCELLED)


@dataclass
class Load:
    turn: Turn
    transfer: object
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: StokerError | None = None


class Tiers:
    """What Prefetcher asks of NodeTiers and its pool. A load is under way until `end`. refused: what the next ones raise."""

    def __init__(self) -> None:
        self.pool = self
        self.loads: dict[str, Load] = {}
        self.began: list[str] = []
        self.given_up: list[str] = []
        self.wanted: dict[str, Sequence[str]] = {}
        self.refused: dict[str, list[StokerError]] = {}

    async def load(self, model_id: str, holder: str, *, turn: Turn, wanted: Sequence[str]) -> tuple[Load, bool]:
        assert holder == "", "nobody holds it"
        await asyncio.sleep(0)
        self.began.append(model_id)
        self.wanted[model_id] = wanted
        if self.refused.get(model_id):
            raise self.refused[model_id].pop(0)
        self.loads[model_id] = Load(turn, SimpleNamespace(arrived_bytes=40, missing_bytes=100))
        return self.loads[model_id], False

    async def give_up(self, load: Load) -> None:
        [model_id] = [model_id for model_id, other in self.loads.items() if other is load]
        self.given_up.append(model_id)
        del self.loads[model_id]

    async def to_disk(self, model_id: str, turn: Turn, wanted: Sequence[str], begun: Callable[[object], None]) -> None:
        load, _ = await self.load(model_id, "", turn=turn, wanted=wanted)
        begun(load.transfer)
        try:
            await load.ended.wait()
        except asyncio.CancelledError:
            await self.give_up(load)
            raise
        if load.error is not None:
            raise load.error

    def end(self, model_id: str, error: StokerError | None = None) -> None:
        load = self.loads.pop(model_id)
        load.error = error
        load.ended.set()

    def name(self, model_id: str) -> str:
        return f"name of {model_id}"

    def held(self) -> list[HeldModel]:
        return [HeldModel(model_id="a", tier=Tier.DRAM, held_bytes=100, total_bytes=100)]


@dataclass
class Rig:
    tiers: Tiers
    told: Told
    prefetcher: Prefetcher

    def order(self, model_id: str, tier: Tier = Tier.DRAM, **fields: object) -> None:
        self.prefetcher.order(PrefetchModel(model_id=model_id, tier=tier, term=1, **fields))

    def outcomes(self) -> list[tuple[str, str]]:
        """(model, done, or the code or reason why it is not), in order."""
        return [
            (subject, data.get("reason") or data.get("code") or "done") for subject, data in self.told.of(*OUTCOMES)
        ]


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    """Nothing is left of a prefetcher that is stopped."""
    tiers, told = Tiers(), Told()
    rig = Rig(tiers, told, Prefetcher(tiers, told, LoopClock()))
    task = asyncio.create_task(rig.prefetcher.part().run())
    await steps(2)
    try:
        yield rig
    finally:
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert others() == set()
        assert tiers.loads == {}

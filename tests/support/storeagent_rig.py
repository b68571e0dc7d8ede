"""The whole storage agent in this process: on the memory bus and database, with its real socket, directory and pool."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.services import eventually

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import Message, ask
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_contracts import subjects
from stoker_contracts.codec import Contract, decode
from stoker_contracts.control import (
    CancelPrefetch,
    CommandReply,
    Done,
    EvictModel,
    Failed,
    HeldModel,
    Locate,
    Located,
    LocateReply,
    PrefetchModel,
    Registered,
    RegisterModel,
    RegisterReply,
    StoreStatus,
    TierStatus,
)
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.clock import SystemClock
from stoker_core.ids import RandomIds
from stoker_core.runner import run_parts
from stoker_core.settings import load
from stoker_db.memory import MemoryDatabase
from stoker_storeagent.adapters.pool import open_pool
from stoker_storeagent.app import assemble
from stoker_storeagent.keep import PoolKeep
from stoker_storeagent.leases import listen
from stoker_storeagent.settings import StoreagentSettings

POOL_CHUNKS = 4


@dataclass
class Agent:
    settings: StoreagentSettings
    broker: MemoryBroker
    database: MemoryDatabase
    pool: Pool
    stop: asyncio.Event
    statuses: list[StoreStatus] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.settings.socket_path

    async def register(self, source: Path | str, name: str = "tiny") -> ModelSpec:
        """source: a URL, or a directory."""
        order = RegisterModel(name=name, source=source if isinstance(source, str) else source.as_uri())
        reply: Registered | Failed = await self._ask(subjects.store_register, order, RegisterReply)
        assert isinstance(reply, Registered), reply
        return reply.model

    async def prefetch(self, model_id: str, tier: Tier = Tier.DRAM, *, term: int = 1, **order: Any) -> Done | Failed:
        return await self._ask(
            subjects.store_prefetch, PrefetchModel(model_id=model_id, tier=tier, term=term, **order), CommandReply
        )

    async def cancel(self, model_id: str, *, term: int = 1) -> Done | Failed:
        return await self._ask(subjects.store_cancel, CancelPrefetch(model_id=model_id, term=term), CommandReply)

    async def evict(self, model_id: str, tier: Tier, *, term: int = 1) -> Done | Failed:
        return await self._ask(subjects.store_evict, EvictModel(model_id=model_id, tier=tier, term=term), CommandReply)

    async def locate(self, model_id: str) -> Located | Failed:
        return await self._ask(subjects.store_locate, Locate(model_id=model_id, node="who-asks"), LocateReply)

    async def _ask(self, subject: Callable[[str], str], message: Contract, reply: Any) -> Any:
        return await ask(self.broker.connect(), subject(self.settings.node), message, reply, timeout_s=10.0)

    def held(self, tier: Tier = Tier.SSD) -> list[HeldModel]:
        return [held for held in self.statuses[-1].held if held.tier is tier] if self.statuses else []

    def status(self, tier: Tier) -> TierStatus:
        [status] = [status for status in self.statuses[-1].tiers if status.tier is tier]
        return status

    def told(self, what: str, tier: Tier) -> list[str]:
        """Models of which `tier.<what>` was said of `tier`, in order."""
        told = [event for event in self.events if event["type"] == f"stoker.tier.{what}"]
        return [event["subject"] for event in told if event["data"]["tier"] == tier]

    def said(self, what: str) -> list[dict[str, Any]]:
        """What came with each `tier.<what>`, in order."""
        return [event["data"] for event in self.events if event["type"] == f"stoker.tier.{what}"]

    async def heard(self, message: Message) -> None:
        self.statuses.append(decode(StoreStatus, message.data))

    async def happened(self, message: Message) -> None:
        event = json.loads(message.data)
        if event["source"] == f"/stoker/storeagent/{self.settings.node}":
            self.events.append(event)


@contextlib.asynccontextmanager
async def agent(
    tmp_path: Path,
    database: MemoryDatabase | None = None,
    *,
    node: str = "n1",
    broker: MemoryBroker | None = None,
    drain_s: float = 5.0,
    **settings: object,
) -> AsyncIterator[Agent]:
    """settings: of the agent, in lower case; without them its pool has POOL_CHUNKS, and nothing is scrubbed."""
    own = {
        "ssd_capacity_bytes": 10**9,
        "pool_bytes": POOL_CHUNKS * CHUNK_BYTES,
        "pool_huge": "none",
        "pool_lock": False,
        "scrub_bytes_per_s": 0,
    }
    made = load(
        StoreagentSettings,
        {"STOKER_HOME": str(tmp_path / "h"), "STOKER_NODE": node}
        | {f"STOKER_STOREAGENT_{key.upper()}": str(value) for key, value in (own | settings).items()},
    )
    broker = broker or MemoryBroker()
    keep = PoolKeep(made.keeper_path, boot_id=f"boot-{node}", clock=SystemClock(), jitter=lambda: 0.5)
    listener = listen(made.socket_path)
    with contextlib.closing(await open_pool(made, keep, timeout_s=5.0)) as opened:
        store = Agent(made, broker, database or MemoryDatabase(), opened.pool, asyncio.Event())
        async with contextlib.AsyncExitStack() as stack:
            for subject, handler in ((subjects.status_store(node), store.heard), (subjects.EVENTS_ALL, store.happened)):
                stack.push_async_callback((await broker.connect().subscribe(subject, handler)).stop)
            parts = await assemble(
                made,
                listener,
                broker.connect(),
                store.database,
                opened,
                keep,
                SystemClock(),
                RandomIds(),
                f"boot-{node}",
                stack,
            )
            running = asyncio.create_task(run_parts(parts, store.stop, drain_s=drain_s))
            try:
                await eventually(lambda: bool(store.statuses), what="a first status")
                yield store
            finally:
                store.stop.set()
                await running
    assert not made.socket_path.exists()

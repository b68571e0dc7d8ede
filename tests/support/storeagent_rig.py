"""The whole storage agent in this process: on the memory bus and database, with its real socket, directory and pool."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.services import eventually

from stoker_bus.memory import MemoryBroker
from stoker_bus.port import Message, ask
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    Failed,
    HeldModel,
    Registered,
    RegisterModel,
    RegisterReply,
    StoreStatus,
    TierStatus,
)
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.clock import SystemClock
from stoker_core.ids import SequentialIds
from stoker_core.runner import run_parts
from stoker_core.settings import load
from stoker_db.memory import MemoryDatabase
from stoker_storeagent.adapters.pool import open_pool
from stoker_storeagent.app import assemble
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

    async def register(self, source: Path, name: str = "tiny") -> ModelSpec:
        order = RegisterModel(name=name, source=source.as_uri())
        reply: Registered | Failed = await ask(
            self.broker.connect(), subjects.store_register("n1"), order, RegisterReply, timeout_s=10.0
        )
        assert isinstance(reply, Registered)
        return reply.model

    def held(self, tier: Tier = Tier.SSD) -> list[HeldModel]:
        return [held for held in self.statuses[-1].held if held.tier is tier] if self.statuses else []

    def status(self, tier: Tier) -> TierStatus:
        [status] = [status for status in self.statuses[-1].tiers if status.tier is tier]
        return status

    def told(self, what: str, tier: Tier) -> list[str]:
        """Models of which `tier.<what>` was said of `tier`, in order."""
        told = [event for event in self.events if event["type"] == f"stoker.tier.{what}"]
        return [event["subject"] for event in told if event["data"]["tier"] == tier]

    async def heard(self, message: Message) -> None:
        self.statuses.append(decode(StoreStatus, message.data))

    async def happened(self, message: Message) -> None:
        self.events.append(json.loads(message.data))


@contextlib.asynccontextmanager
async def agent(
    tmp_path: Path, database: MemoryDatabase | None = None, *, drain_s: float = 5.0, **settings: object
) -> AsyncIterator[Agent]:
    """settings: of the agent, in lower case; without them its pool has POOL_CHUNKS."""
    own = {
        "ssd_capacity_bytes": 10**9,
        "pool_bytes": POOL_CHUNKS * CHUNK_BYTES,
        "pool_huge": "none",
        "pool_lock": False,
    }
    made = load(
        StoreagentSettings,
        {"STOKER_HOME": str(tmp_path / "h"), "STOKER_NODE": "n1"}
        | {f"STOKER_STOREAGENT_{key.upper()}": str(value) for key, value in (own | settings).items()},
    )
    broker = MemoryBroker()
    with open_pool(made) as pool:
        store = Agent(made, broker, database or MemoryDatabase(), pool, asyncio.Event())
        await broker.connect().subscribe(subjects.STATUS_STORE_ALL, store.heard)
        await broker.connect().subscribe(subjects.EVENTS_ALL, store.happened)
        listener = listen(made.socket_path)
        parts = await assemble(made, listener, broker.connect(), store.database, pool, SystemClock(), SequentialIds())
        running = asyncio.create_task(run_parts(parts, store.stop, drain_s=drain_s))
        try:
            await eventually(lambda: bool(store.statuses), what="a first status")
            yield store
        finally:
            store.stop.set()
            await running
    assert not made.socket_path.exists()

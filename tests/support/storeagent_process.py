"""The storage agent as a process, and what a gateway and the database see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.services import ServiceProcess, eventually, running
from tests.support.storeagent_rig import POOL_CHUNKS

from stoker_bus.nats import NatsBus
from stoker_bus.port import Message, ask
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    CommandReply,
    Done,
    EvictModel,
    Failed,
    HeldModel,
    Registered,
    RegisterModel,
    RegisterReply,
    StoreStatus,
    TierStatus,
)
from stoker_contracts.models import Tier
from stoker_core.errors import NoResponders
from stoker_db.pg import PgDatabase

NODE = "node-a"


@dataclass
class System:
    """process: the agent that was started last.  statuses, events: of all, in order."""

    environment: dict[str, str]
    log: Path
    process: ServiceProcess
    bus: NatsBus
    database: PgDatabase
    statuses: list[StoreStatus] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return Path(self.environment["STOKER_HOME"]) / "nodes" / NODE / "store.sock"

    @property
    def ssd(self) -> Path:
        return self.socket.parent / "ssd"

    async def register(self, name: str, source: Path | str) -> Registered | Failed:
        """source: a URL, or a directory."""
        order = RegisterModel(name=name, source=source if isinstance(source, str) else source.as_uri())
        while True:
            try:
                reply: Registered | Failed = await ask(
                    self.bus, subjects.store_register(NODE), order, RegisterReply, timeout_s=20.0
                )
                return reply
            except NoResponders:  # it is still starting
                await asyncio.sleep(0.05)

    async def evicted(self, model_id: str, tier: Tier) -> None:
        """Order it until it is done: what is still being copied is in use."""
        order = EvictModel(model_id=model_id, tier=tier, term=1)

        async def gone() -> bool:
            return isinstance(
                await ask(self.bus, subjects.store_evict(NODE), order, CommandReply, timeout_s=20.0), Done
            )

        await eventually(gone, what=f"the end of the model in {tier}")

    def refusals(self) -> list[str]:
        """Codes of those that were told of, in order."""
        return [event["data"]["code"] for event in self.events if event["type"] == "stoker.tier.refused"]

    def held(self, tier: Tier) -> list[HeldModel]:
        return [held for held in self.statuses[-1].held if held.tier is tier] if self.statuses else []

    def status(self, tier: Tier) -> TierStatus:
        [status] = [status for status in self.statuses[-1].tiers if status.tier is tier]
        return status

    async def leases(self, count: int) -> None:
        """Until the one model in memory has that many."""
        await eventually(
            lambda: [held.leases for held in self.held(Tier.DRAM)] == [count], what=f"{count} leases in the status"
        )

    async def copied(self) -> None:
        """Until everything of the one model is on the SSD."""
        await eventually(
            lambda: [held.held_bytes == held.total_bytes for held in self.held(Tier.SSD)] == [True],
            what="the copy on the SSD",
        )

    @contextlib.asynccontextmanager
    async def successor(self) -> AsyncIterator[None]:
        """Another agent in the place of one that has ended; ready within the block."""
        before = {status.boot_id for status in self.statuses}

        def others() -> list[StoreStatus]:  # the last words of the one before may still come
            return [status for status in self.statuses if status.boot_id not in before]

        with running("stoker_storeagent", self.environment, self.log) as self.process:
            await eventually(lambda: bool(others()), what="a first status")
            self.statuses[:] = others()
            yield

    async def heard(self, message: Message) -> None:
        self.statuses.append(decode(StoreStatus, message.data))

    async def happened(self, message: Message) -> None:
        self.events.append(json.loads(message.data))


def environment(nats_url: str, postgres_url: str, home: Path) -> dict[str, str]:
    return {
        "STOKER_HOME": str(home),
        "STOKER_NODE": NODE,
        "STOKER_NATS_URL": nats_url,
        "STOKER_POSTGRES_URL": postgres_url,
        "STOKER_LOG_FORMAT": "json",
        "STOKER_STOREAGENT_METRIC_SAMPLE_S": "0.2",
        "STOKER_STOREAGENT_POOL_BYTES": str(POOL_CHUNKS * CHUNK_BYTES),
    }


@contextlib.asynccontextmanager
async def system_of(process: ServiceProcess, environment: Mapping[str, str], log: Path) -> AsyncIterator[System]:
    bus = await NatsBus.connect(environment["STOKER_NATS_URL"], name="test")
    database = await PgDatabase.connect(environment["STOKER_POSTGRES_URL"])
    system = System(dict(environment), log, process, bus, database)
    try:
        await bus.subscribe(subjects.STATUS_STORE_ALL, system.heard)
        await bus.subscribe(subjects.EVENTS_ALL, system.happened)
        yield system
    finally:
        await bus.close()
        await database.close()

"""The tiers of a running system, as its own services see them, and the S3 that its storage agents ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.held_s3 import BUCKET, HeldS3
from tests.support.services import eventually
from tests.support.stack import Stack

from stoker_bus.nats import NatsBus
from stoker_bus.port import Message, ask
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import CommandReply, Done, EvictModel, HeldModel, StoreStatus, TierStatus, WorkerStatus
from stoker_contracts.models import Tier

HTTP_S = 120.0


class StackTiers:
    """statuses: of all storage agents, in order.  term: of the leader.

    What waits for the system does so in a thread: the S3 that it may be asking lives in this event loop.
    """

    def __init__(self, stack: Stack, bus: NatsBus) -> None:
        self.stack, self._bus = stack, bus
        self.statuses: list[StoreStatus] = []
        self.term = 0

    @property
    def node(self) -> str:
        """The one of `stoker up`."""
        [folder] = (self.stack.home / "nodes").iterdir()
        return folder.name

    @property
    def ssd(self) -> Path:
        return self.stack.home / "nodes" / self.node / "ssd"

    @property
    def status(self) -> StoreStatus:
        """The last of that node."""
        return next(status for status in reversed(self.statuses) if status.node == self.node)

    def tier(self, tier: Tier) -> TierStatus:
        [found] = [status for status in self.status.tiers if status.tier is tier]
        return found

    def held(self, model_id: str, tier: Tier) -> HeldModel | None:
        return held_in(self.status, model_id, tier)

    def whole(self, model_id: str, tier: Tier) -> bool:
        held = self.held(model_id, tier)
        return held is not None and held.held_bytes == held.total_bytes

    async def deploy(self, source: Path | str, name: str, *options: str) -> str:
        """Through the command line. Returns the model's id."""
        done = await asyncio.to_thread(self.stack.cli, "deploy", str(source), "--name", name, *options)
        assert done.returncode == 0, done.stderr
        _, _, answer = await asyncio.to_thread(self.stack.http, "GET", "/admin/v1/models")
        [model_id] = [model["model_id"] for model in answer["models"] if model["name"] == name]
        return str(model_id)

    async def remove(self, *names: str) -> None:
        for name in names:
            assert (await asyncio.to_thread(self.stack.cli, "rm", name)).returncode == 0

    async def complete(self, model: str, prompt: str, max_tokens: int, **fields: Any) -> str:
        """The text that follows a prompt, greedily."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | fields
        status, _, answer = await asyncio.to_thread(self.stack.http, "POST", "/v1/completions", body, timeout_s=HTTP_S)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    async def instances(self, model: str, *states: str) -> list[dict[str, Any]]:
        """In these states; without any, all."""
        found = await asyncio.to_thread(self.stack.instances, model)
        return [instance for instance in found if not states or instance["state"] in states]

    async def ready(self, model: str) -> dict[str, Any]:
        """The one instance that is."""
        [instance] = await self.instances(model, "ready")
        return instance

    async def idle_out(self, model: str) -> None:
        """Until its keep-alive is over and its instance gone."""

        async def gone() -> bool:
            return not await self.instances(model, "starting", "ready", "stopping")

        await eventually(gone, what=f"{model} stopped")

    async def evict(self, model_id: str, tier: Tier) -> None:
        """As a leader orders it."""
        order = EvictModel(model_id=model_id, tier=tier, term=self.term)

        async def done() -> bool:
            reply = await ask(self._bus, subjects.store_evict(self.node), order, CommandReply, timeout_s=10.0)
            return isinstance(reply, Done)

        await eventually(done, what=f"no {model_id} in {tier}")

    async def heard_store(self, message: Message) -> None:
        self.statuses.append(decode(StoreStatus, message.data))

    async def heard_worker(self, message: Message) -> None:
        status: WorkerStatus = decode(WorkerStatus, message.data)
        self.term = max(self.term, status.term)


def held_in(status: StoreStatus, model_id: str, tier: Tier) -> HeldModel | None:
    return next((held for held in status.held if (held.model_id, held.tier) == (model_id, tier)), None)


@asynccontextmanager
async def stack_tiers(stack: Stack) -> AsyncIterator[StackTiers]:
    bus = await NatsBus.connect(stack.endpoints["nats_url"], name="test")
    try:
        tiers = StackTiers(stack, bus)
        await bus.subscribe(subjects.STATUS_STORE_ALL, tiers.heard_store)
        await bus.subscribe(subjects.STATUS_WORKER_ALL, tiers.heard_worker)
        await eventually(lambda: bool(tiers.statuses) and tiers.term > 0, what="a first status of each")
        yield tiers
    finally:
        await bus.close()


@asynccontextmanager
async def stack_s3(stack: Stack, directory: Path) -> AsyncIterator[HeldS3]:
    """What the system's agents are told that S3 is. Its objects lie below `directory`."""
    (directory / BUCKET).mkdir(parents=True)
    server = HeldS3(directory)
    await server.start(stack.s3_port)
    try:
        yield server
    finally:
        await server.let_go()
        await server.close()

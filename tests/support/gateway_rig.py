"""A gateway in this process, on real NATS and Postgres, with a scripted node beside it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from openai import AsyncOpenAI
from tests.support.fake_instance import VOCAB_SIZE, FakeNode, model_spec
from tests.support.tiny_tokenizer import build_tokenizer, write_tokenizer

from stoker_bus.nats import NatsBus
from stoker_contracts.models import ModelSpec
from stoker_core.clock import SystemClock
from stoker_core.ids import RandomIds
from stoker_core.runner import run_parts
from stoker_db.pg import PgDatabase
from stoker_db.ports import ModelFile
from stoker_gateway.app import Gateway
from stoker_gateway.settings import GatewaySettings


def tokens_of(text: str) -> list[int]:
    """What an instance must generate to have said `text`."""
    return list(build_tokenizer(VOCAB_SIZE).encode(text).ids)


def tokenizer_files() -> list[ModelFile]:
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory), VOCAB_SIZE)
        return [
            ModelFile(path=file.name, size_bytes=file.stat().st_size, content=file.read_bytes())
            for file in sorted(Path(directory).iterdir())
        ]


async def eventually(condition: Callable[[], bool], what: str, *, timeout_s: float = 10.0) -> None:
    """Return once `condition` holds; fail naming `what` otherwise."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} within {timeout_s:g} s") from None


@dataclass
class Rig:
    url: str
    bus: NatsBus  # the test's own connection
    database: PgDatabase
    node: FakeNode
    http: aiohttp.ClientSession
    client: AsyncOpenAI
    spec: ModelSpec
    stop: asyncio.Event

    async def register(self, spec: ModelSpec) -> None:
        """Put a model in the database and wait until the gateway serves it."""
        await self.database.models.add(spec, tokenizer_files())
        async with asyncio.timeout(15):
            while (await self.http.get(f"/v1/models/{spec.name}")).status != 200:
                await asyncio.sleep(0.02)

    async def post(self, path: str, body: object) -> tuple[int, dict[str, object], aiohttp.ClientResponse]:
        """Status, JSON and the response. bytes go as they are."""
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.http.post(path, **data) as response:
            return response.status, await response.json(), response


@asynccontextmanager
async def gateway_rig(
    nats_url: str, postgres_url: str, home: Path, *, spec: ModelSpec | None = None, **settings: object
) -> AsyncIterator[Rig]:
    """With one registered model (`spec`), no instance, and clients that do not retry."""
    chosen = GatewaySettings(
        home=home,
        nats_url=nats_url,
        postgres_url=postgres_url,
        port=0,
        node="test",
        model_refresh_s=0.1,
        **settings,  # type: ignore[arg-type]
    )
    spec = spec or model_spec()
    clock, ids, stop = SystemClock(), RandomIds(), asyncio.Event()
    database = await PgDatabase.connect(postgres_url)
    own, its = await NatsBus.connect(nats_url, name="test"), await NatsBus.connect(nats_url, name="gateway")
    gateway = Gateway(chosen, its, database, clock, ids, gateway_id=ids.new("gw"))
    await gateway.start()
    running = asyncio.create_task(run_parts(gateway.parts(), stop, drain_s=chosen.drain_s))
    url = f"http://127.0.0.1:{gateway.port}"
    try:
        async with (
            aiohttp.ClientSession(url) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
            FakeNode(own) as node,
        ):
            rig = Rig(url, own, database, node, http, client, spec, stop)
            await rig.register(spec)
            yield rig
    finally:
        stop.set()
        await running
        gateway.close()
        await own.close()
        await its.close()
        await database.close()

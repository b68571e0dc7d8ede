"""What `stoker bench tiers` measures: storage agents, with the NATS, PostgreSQL and S3 that they need, each a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stoker_bus.nats import NatsBus
from stoker_bus.port import Message, ask
from stoker_cli import home, system
from stoker_cli.ports import choose
from stoker_cli.settings import UpSettings
from stoker_cli.supervisor import ProcessSpec, Supervisor
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    CommandReply,
    Done,
    EvictModel,
    Failed,
    HeldModel,
    PrefetchModel,
    Registered,
    RegisterModel,
    RegisterReply,
    StoreStatus,
)
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.clock import SystemClock
from stoker_core.errors import NoResponders, SetupFailed
from stoker_core.settings import load

TERM = 1
ANSWER_S = 30.0
WAIT_S = 300.0
"""For a node to come into a state that is not measured."""
POLL_S = 0.02


@dataclass(frozen=True)
class Node:
    """A storage agent to run. settings: its own, STOKER_STOREAGENT_… without the prefix, in lower case."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)


class Cluster:
    """The agents that run, and what they say of themselves."""

    def __init__(self, bus: NatsBus, work: Path) -> None:
        self._bus, self._work = bus, work
        self._news = asyncio.Condition()
        self.statuses: dict[str, StoreStatus] = {}
        self._whole_s: dict[tuple[str, str, Tier], float] = {}

    def socket(self, node: str) -> Path:
        return self._work / node / "nodes" / node / "store.sock"

    def chunks(self, node: str) -> list[Path]:
        """Files of the node's SSD tier."""
        return list((self.socket(node).parent / "ssd" / "chunks").glob("*/*"))

    async def hear(self, message: Message) -> None:
        now_s = time.perf_counter()
        status = decode(StoreStatus, message.data)
        self.statuses[status.node] = status
        whole = {(status.node, held.model_id, held.tier) for held in status.held if held.held_bytes == held.total_bytes}
        self._whole_s = {key: at_s for key, at_s in self._whole_s.items() if key[0] != status.node or key in whole}
        self._whole_s |= {key: now_s for key in whole if key not in self._whole_s}
        async with self._news:
            self._news.notify_all()

    def held(self, node: str, model_id: str, tier: Tier) -> HeldModel | None:
        status = self.statuses[node]
        return next((held for held in status.held if (held.model_id, held.tier) == (model_id, tier)), None)

    async def until(self, check: Callable[[], bool], what: str) -> None:
        """Raises SetupFailed after WAIT_S."""
        try:
            async with asyncio.timeout(WAIT_S), self._news:
                await self._news.wait_for(check)
        except TimeoutError as error:
            raise SetupFailed(f"{what}: not within {WAIT_S:g} s") from error

    async def whole(self, node: str, model_id: str, tier: Tier) -> float:
        """Until a node holds all of a model there; returns when it said so first, as time.perf_counter tells it."""
        await self.until(
            lambda: (node, model_id, tier) in self._whole_s, f"{model_id} in the {tier} of {node} as a whole"
        )
        return self._whole_s[node, model_id, tier]

    async def register(self, node: str, name: str, source: str) -> ModelSpec:
        """Raises SetupFailed with what the agent says against it."""
        order, until_s = RegisterModel(name=name, source=source), time.perf_counter() + WAIT_S
        while True:
            try:
                reply: Registered | Failed = await ask(
                    self._bus, subjects.store_register(node), order, RegisterReply, timeout_s=ANSWER_S
                )
                break
            except NoResponders:  # it has said that it lives, and does not listen yet
                if time.perf_counter() > until_s:
                    raise
                await asyncio.sleep(POLL_S)
        if isinstance(reply, Failed):
            raise SetupFailed(f"{source} cannot be registered: {reply.message}")
        return reply.model

    async def prefetch(self, node: str, model_id: str, tier: Tier, sources: Sequence[str] = ()) -> None:
        """Order it; `whole` tells when it is there."""
        order = PrefetchModel(model_id=model_id, tier=tier, term=TERM, sources=tuple(sources))
        reply = await self._order(subjects.store_prefetch(node), order)
        if reply is not None:
            raise SetupFailed(f"{node} does not prefetch: {reply.message}")

    async def bring(self, node: str, model_id: str, tier: Tier) -> None:
        """Until the node has all of it there, and nothing of it is on its way any more."""
        await self.prefetch(node, model_id, tier)
        await self.whole(node, model_id, tier)
        await self.until(lambda: not self._busy(node, model_id), f"{model_id} at rest on {node}")

    async def evict(self, node: str, model_id: str, *tiers: Tier) -> None:
        """Until the node says that it holds nothing of it there."""
        for tier in tiers:
            until_s = time.perf_counter() + WAIT_S
            while (reply := await self._order(subjects.store_evict(node), _eviction(model_id, tier))) is not None:
                if not reply.retryable or time.perf_counter() > until_s:
                    raise SetupFailed(f"{node} does not evict from {tier}: {reply.message}")
                await asyncio.sleep(POLL_S)
        await self.until(
            lambda: all(self.held(node, model_id, tier) is None for tier in tiers), f"nothing of {model_id} on {node}"
        )

    def read_bytes(self, node: str) -> dict[str, int]:
        """What it has had from each peer so far, as it said last."""
        return {link.peer: link.read_bytes for link in self.statuses[node].links}

    def _busy(self, node: str, model_id: str) -> bool:
        return any(held.leases for held in self.statuses[node].held if held.model_id == model_id)

    async def _order(self, subject: str, order: PrefetchModel | EvictModel) -> Failed | None:
        reply: Done | Failed = await ask(self._bus, subject, order, CommandReply, timeout_s=ANSWER_S)
        return reply if isinstance(reply, Failed) else None


def _eviction(model_id: str, tier: Tier) -> EvictModel:
    return EvictModel(model_id=model_id, tier=tier, term=TERM)


@contextlib.asynccontextmanager
async def running(
    work: Path, nodes: Sequence[Node], endpoint_url: str, say: Callable[[str], None]
) -> AsyncIterator[Cluster]:
    """All of it, answering. work: logs and homes.  endpoint_url: of S3.

    Raises SetupFailed if something does not start, or dies.
    """
    clock, stop = SystemClock(), asyncio.Event()
    settings = load(UpSettings, {"STOKER_HOME": str(work / "up")})
    for folder in (work, settings.home):  # as root PostgreSQL runs under another account, which has to pass
        folder.mkdir(exist_ok=True)
        folder.chmod(0o711)
    home.prepare(settings.home, settings.node)
    secrets = home.load_secrets(settings.home)
    ports = [await choose(0, what=what, setting="", clock=clock) for what in ("NATS", "PostgreSQL")]
    nats, postgres = system.servers(settings, secrets, *ports)
    nats.prepare()
    await asyncio.to_thread(postgres.prepare)
    base = {key: value for key, value in os.environ.items() if not key.startswith(("STOKER_", "AWS_"))}
    shared = base | {
        "STOKER_NATS_URL": nats.url,
        "STOKER_POSTGRES_URL": postgres.url,
        "STOKER_STOREAGENT_CLUSTER_TOKEN": system.peer_token(secrets.cluster_secret),
        "STOKER_STOREAGENT_S3_ENDPOINT_URL": endpoint_url,
        "STOKER_STOREAGENT_S3_ANONYMOUS": "true",
        "STOKER_STOREAGENT_S3_REGION": "us-east-1",
    }
    servers = [spec for spec in system.plan(settings, nats, postgres, {}, base) if spec.name in ("nats", "postgres")]
    supervisor = Supervisor(
        [*servers, *(_agent(work, node, shared) for node in nodes)], logs=work / "logs", clock=clock, report=say
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(stop, asyncio.Event()), name="supervisor")
        try:
            await supervisor.wait_ready("nats", "postgres")
            bus = await NatsBus.connect(nats.url, name="bench")
            try:
                cluster = Cluster(bus, work)
                await bus.subscribe(subjects.STATUS_STORE_ALL, cluster.hear)
                names = {node.name for node in nodes}
                await cluster.until(lambda: names <= cluster.statuses.keys(), "a status of every storage agent")
                yield cluster
            finally:
                await bus.close()
        finally:
            stop.set()


def _agent(work: Path, node: Node, shared: Mapping[str, str]) -> ProcessSpec:
    own = {f"STOKER_STOREAGENT_{name.upper()}": str(value) for name, value in node.settings.items()}
    # Nothing runs beside what is measured: neither the check of what lies on the disk nor many samples.
    quiet = {"STOKER_STOREAGENT_SCRUB_BYTES_PER_S": "0", "STOKER_STOREAGENT_METRIC_SAMPLE_S": "3600"}
    return ProcessSpec(
        name=node.name,
        command=(sys.executable, "-m", "stoker_storeagent"),
        env={**shared, **quiet, **own, "STOKER_HOME": str(work / node.name), "STOKER_NODE": node.name},
        after=("nats", "postgres"),
    )


@contextlib.contextmanager
def s3_server(root: Path) -> Iterator[str]:
    """The URL of a server of S3 over the directories below `root`."""
    with subprocess.Popen(
        [sys.executable, "-m", "stoker_cli.bench.s3_server", str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SetupFailed("the server of S3 does not start")
            yield json.loads(line)["url"]
        finally:
            process.stdin.close()  # it ends when it notices

"""Rounds of `stoker bench tiers`: nodes are put into the state that a way begins with, the machine rests, one thing is measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_cli.bench import page_cache
from stoker_cli.bench.load_figures import rotated
from stoker_cli.bench.load_run import Child
from stoker_cli.bench.make_checkpoint import Checkpoint
from stoker_cli.bench.tiers_child import Job, Role
from stoker_cli.bench.tiers_fan import FanOut
from stoker_cli.bench.tiers_figures import FANS, WAYS, Round, with_ratios
from stoker_cli.bench.tiers_system import Cluster, Node, running, s3_server
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.errors import SetupFailed
from stoker_core.settings import load
from stoker_storeagent.settings import StoreagentSettings

SOLO, HOLDER, TAKER = "solo", "holder", "taker"
"""solo knows no peers: for it there is S3 alone. taker takes from holder."""
LEASES = ("s3", "peer", "ssd", "dram")
"""Ways that one lease takes."""
ROLES_OF: dict[Role, frozenset[str]] = {
    "client": frozenset({*LEASES, "stepwise"}),
    "stages": frozenset({"fetch", "write", "loopback"}),
    "sender": frozenset({"loopback"}),
}
"""Which ways need which processes."""
BUCKET = "bench"
REST_S = 0.5
SPARE_CHUNKS = 2


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """directory: where files are made; models lie in its s3/BUCKET.  checkpoint: what is brought.  fan: what is fanned out, if anything."""

    directory: Path
    checkpoint: Checkpoint
    fan: Checkpoint | None = None


class Bench:
    def __init__(
        self,
        work: Work,
        names: Sequence[str],
        *,
        cap_bytes_per_s: int,
        say: Callable[[str], None],
        rest_s: float = REST_S,
    ) -> None:
        """names: of WAYS and FANS, what is measured."""
        self._work, self._names, self._say = work, names, say
        self._cap_bytes_per_s, self._rest_s = cap_bytes_per_s, rest_s
        self._settings = load(StoreagentSettings, {})

    async def run(self, rounds: int, *, verify: bool) -> list[Round]:
        """Measure everything `rounds` times, in rotating order, after a round that does not count.

        verify: compare what a client has with the checkpoint, in the round that does not count.
        Raises SetupFailed if something fails, or a client has wrong bytes.
        """
        async with self._prepared() as measure:
            self._say("a round that does not count: sessions, connections and digests are new in it")
            for name in self._names:
                await measure(name, verify)
            measured = []
            for number in range(rounds):
                found: Round = {}
                for name in rotated(self._names, number):
                    await asyncio.sleep(self._rest_s)
                    found |= await measure(name, False)
                seconds = (f"{name[:-2]} {value:.3f} s" for name, value in found.items() if name.endswith("_s"))
                self._say(f"round {number + 1} of {rounds}: {', '.join(seconds)}")
                measured.append(self._with_ratios(found))
        return measured

    def _with_ratios(self, found: Round) -> Round:
        fan = self._work.fan
        return with_ratios(found, self._work.checkpoint.total_bytes, fan.total_bytes if fan is not None else 0)

    @asynccontextmanager
    async def _prepared(self) -> AsyncIterator[Callable[[str, bool], Awaitable[Round]]]:
        work = self._work
        async with AsyncExitStack() as stack:
            url = stack.enter_context(s3_server(work.directory / "s3"))
            ways = [name for name in self._names if name in WAYS]
            fans = [name for name in self._names if name in FANS]
            fanning = FanOut(work.fan, fans, self._cap_bytes_per_s) if work.fan is not None else None
            nodes = [*self._nodes(ways), *(fanning.nodes if fanning is not None else ())]
            logs = work.directory / "logs"
            logs.mkdir(exist_ok=True)
            cluster = await stack.enter_async_context(running(work.directory, nodes, url, self._say))
            bring = await stack.enter_async_context(self._bringing(cluster, ways, url)) if ways else None
            if fanning is not None and work.fan is not None:
                await fanning.prepare(cluster, f"s3://{BUCKET}/{work.fan.directory.name}")

            async def measure(name: str, verify: bool) -> Round:
                if name in WAYS:
                    assert bring is not None
                    return await bring.measure(name, verify=verify)
                assert fanning is not None
                return await fanning.measure(name)

            yield measure

    def _nodes(self, ways: Sequence[str]) -> list[Node]:
        own = {"pool_bytes": pool_bytes(self._work.checkpoint)}
        nodes = [Node(SOLO, own | {"cluster_token": ""})] if {*ways} & {"s3", "ssd", "dram", "stepwise"} else []
        return [*nodes, Node(HOLDER, own), Node(TAKER, own)] if "peer" in ways else nodes

    @asynccontextmanager
    async def _bringing(self, cluster: Cluster, ways: Sequence[str], endpoint_url: str) -> AsyncIterator[Bringing]:
        checkpoint, settings = self._work.checkpoint, self._settings
        url = f"s3://{BUCKET}/{checkpoint.directory.name}"
        model: ModelSpec | None = None
        for node in (SOLO, HOLDER):
            if node in cluster.statuses:
                model = await cluster.register(node, "bench", url)
        async with AsyncExitStack() as stack:
            children: dict[str, Child] = {}
            for role in ROLES_OF:
                if ROLES_OF[role].isdisjoint(ways):
                    continue
                job = Job(
                    role=role,
                    directory=str(checkpoint.directory),
                    url=url,
                    endpoint_url=endpoint_url,
                    scratch=str(self._work.directory / "alone"),
                    at_once=settings.fetches_at_once,
                    threads=settings.ssd_threads,
                )
                log = self._work.directory / "logs" / f"{role}.log"
                children[role] = stack.enter_context(Child(role, "tiers_child", job, log))
            for child in children.values():
                await asyncio.to_thread(child.wait_ready)
            yield Bringing(cluster, checkpoint, model, children)


class Bringing:
    """One model to one client, in all the ways there are."""

    def __init__(
        self, cluster: Cluster, checkpoint: Checkpoint, model: ModelSpec | None, children: dict[str, Child]
    ) -> None:
        self._cluster, self._checkpoint, self._children = cluster, checkpoint, children
        self._model_id = model.model_id if model is not None else ""

    async def measure(self, name: str, *, verify: bool) -> Round:
        """verify: also compare what a client has, not timed. Raises SetupFailed."""
        if name in LEASES:
            node = TAKER if name == "peer" else SOLO
            await getattr(self, f"_before_{name}")()
            return {f"{name}_s": await self._leased(node, name, verify=verify)}
        if name == "stepwise":
            return await self._stepwise()
        if name == "loopback":
            return {"loopback_s": await self._loopback()}
        if name == "fetch":
            await self._s3_in_memory()
        return {f"{name}_s": (await self._call("stages", name))["seconds"]}

    async def _before_s3(self) -> None:
        await self._cluster.evict(SOLO, self._model_id, Tier.DRAM, Tier.SSD)
        await self._s3_in_memory()

    async def _before_peer(self) -> None:
        await self._cluster.bring(HOLDER, self._model_id, Tier.DRAM)
        await self._cluster.evict(TAKER, self._model_id, Tier.DRAM, Tier.SSD)

    async def _before_ssd(self) -> None:
        await self._cluster.bring(SOLO, self._model_id, Tier.SSD)
        await self._cluster.evict(SOLO, self._model_id, Tier.DRAM)
        await asyncio.to_thread(page_cache.drop, self._cluster.chunks(SOLO))

    async def _before_dram(self) -> None:
        await self._cluster.bring(SOLO, self._model_id, Tier.DRAM)

    async def _stepwise(self) -> Round:
        """Download it, and only then load it: what a node does that knows no pipeline."""
        await self._before_s3()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await self._cluster.prefetch(SOLO, self._model_id, Tier.SSD)
        await self._cluster.whole(SOLO, self._model_id, Tier.SSD)
        download_s = loop.time() - began_s
        await self._leased(SOLO, "ssd", verify=False)
        return {"stepwise_s": loop.time() - began_s, "download_s": download_s}

    async def _leased(self, node: str, expected: str, *, verify: bool) -> float:
        answer = await self._call("client", "lease", store=str(self._cluster.socket(node)), model_id=self._model_id)
        source = {"s3": Tier.REMOTE}.get(expected, expected)
        if answer["source"] != source:
            raise SetupFailed(f"{node} takes the model from {answer['source']}, not from {source}: see its log")
        if verify:
            found = await self._call("client", "check", record=str(self._checkpoint.record))
            if found["count"]:
                raise SetupFailed(
                    f"from {expected} come wrong bytes in {found['count']} tensors: {', '.join(found['wrong'])} …"
                )
        await self._call("client", "release")
        return float(answer["seconds"])

    async def _loopback(self) -> float:
        port = (await self._call("sender", "port"))["port"]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._call("sender", "send"))
            receiving = group.create_task(self._call("stages", "receive", port=port))
        return float(receiving.result()["seconds"])

    async def _s3_in_memory(self) -> None:
        """The server has what it is to send: this machine's disk is no part of what stands for remote storage."""

        def read() -> None:
            for file in self._checkpoint.files:
                with file.open("rb", buffering=0) as opened:
                    while opened.read(CHUNK_BYTES):
                        pass

        await asyncio.to_thread(read)

    async def _call(self, role: str, name: str, **arguments: Any) -> dict[str, Any]:
        return await asyncio.to_thread(self._children[role].call, name, **arguments)


def pool_bytes(checkpoint: Checkpoint) -> int:
    """Of a pool that holds it: whole chunks of every file, and a little more."""
    chunks = sum(-(-file.stat().st_size // CHUNK_BYTES) for file in checkpoint.files)
    return (chunks + SPARE_CHUNKS) * CHUNK_BYTES

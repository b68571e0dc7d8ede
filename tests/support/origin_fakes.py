"""Who gives chunks, in memory: a model's source, and peers. How each request is answered is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support.storeagent_fakes import right

from stoker_checkpoint.digests import chunk_digest
from stoker_contracts.control import LinkStatus, Located
from stoker_core.errors import StokerError
from stoker_storeagent.ports import OnBytes
from stoker_storeagent.records import Checkpoint


@dataclass(frozen=True)
class Serve:
    """How a request is answered: so many bytes (None: all), right or wrong, and then `error`."""

    upto: int | None = None
    error: StokerError | None = None
    wrong: bool = False


@dataclass
class Giver:
    """Who gives a model's chunks. script: how the next requests are answered; the rest get `then`."""

    checkpoint: Checkpoint
    script: list[Serve] = field(default_factory=list)
    then: Serve = field(default_factory=Serve)
    piece_bytes: int = 3000
    said: str | None = None
    """The digest that it says, if it is not that of what belongs there."""
    asked: list[tuple[int, int]] = field(default_factory=list)  # (position, offset)
    at_once: int = 0
    at_once_max: int = 0

    async def give(self, position: int, offset: int, into: memoryview, on_bytes: OnBytes) -> str:
        self.asked.append((position, offset))
        serve = self.script.pop(0) if self.script else self.then
        data = right(self.checkpoint, position)[offset : offset + len(into)]
        assert len(data) == len(into), "no more is asked for than there is"
        if serve.wrong:
            data = bytes(byte ^ 0xFF for byte in data)
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            upto = len(data) if serve.upto is None else min(serve.upto, len(data) - 1)
            for begin in range(0, upto, self.piece_bytes):
                await asyncio.sleep(0)
                end = min(begin + self.piece_bytes, upto)
                into[begin:end] = data[begin:end]
                on_bytes(end)
            await asyncio.sleep(0)
            if serve.error is not None:
                raise serve.error
        finally:
            self.at_once -= 1
        return chunk_digest(right(self.checkpoint, position)) if self.said is None else self.said


class Source:
    """Implements ports.Source for whole shards of one model."""

    kind = "s3"

    def __init__(self, checkpoint: Checkpoint, *script: Serve, then: Serve | None = None) -> None:
        self.giver = Giver(checkpoint, list(script), then or Serve())

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        checkpoint = self.giver.checkpoint
        assert url == checkpoint.source
        assert version == checkpoint.versions.get(shard, "")
        for position in range(checkpoint.positions):
            name, begin, size_bytes = checkpoint.place(position)
            if name == shard and begin <= offset < begin + size_bytes:
                await self.giver.give(position, offset - begin, into, on_bytes)
                return
        raise AssertionError(f"{shard} has no byte {offset}")


class Peers:
    """Implements ports.Peers. nodes: what each gives; all of them have all of it, from begin_s on (0 where it says nothing)."""

    def __init__(self, **nodes: Giver) -> None:
        self.nodes = nodes
        self.begin_s: dict[str, float] = {}
        self.suspected: list[tuple[str, str]] = []
        self.bandwidth: dict[str, float] = {}

    async def locate(self, model_id: str, wanted: Sequence[str] = ()) -> list[Located]:
        await asyncio.sleep(0)
        now_s = asyncio.get_running_loop().time()
        return [
            Located(node=node, address=f"{node}:1", held_bytes=1, total_bytes=1, upstream=(f"before {node}",))
            for node in sorted(self.nodes)
            if now_s >= self.begin_s.get(node, 0.0)
        ]

    async def read(
        self, located: Located, model_id: str, position: int, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> str:
        return await self.nodes[located.node].give(position, offset, into, on_bytes)

    def links(self) -> tuple[LinkStatus, ...]:
        return tuple(LinkStatus(peer=node, read_bytes_per_s=rate) for node, rate in sorted(self.bandwidth.items()))

    def suspect(self, node: str, reason: str) -> None:
        self.suspected.append((node, reason))

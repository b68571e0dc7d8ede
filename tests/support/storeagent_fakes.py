"""What the storage agent's logic needs of the world, in memory: models, a disk, a load, events. Source and peers: origin_fakes.py.

Every call gives way to other tasks at least once. Faults are scripted, so that nothing here depends on chance.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.ssd_rig import HEADER_BYTES, content

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.manifest import Manifest, Shard, TensorRef
from stoker_core.errors import StokerError
from stoker_storeagent.records import Checkpoint


def model(
    model_id: str = "m", sizes: Sequence[int] = (5000, 20000, 8192), *, bound: bool = False, versions: bool = True
) -> Checkpoint:
    """Its shards are called 0, 1, …: one for each of sizes, and a position each unless it is over a chunk."""
    shards = []
    for number, size in enumerate(sizes):
        name, data = f"{number}.safetensors", size - HEADER_BYTES
        tensor = TensorRef(
            name=str(number), dtype="U8", shape=(data,), shard=name, offset_bytes=HEADER_BYTES, size_bytes=data
        )
        shards.append(Shard(name=name, size_bytes=size, data_offset_bytes=HEADER_BYTES, tensors=(tensor,), metadata={}))
    made = Checkpoint(
        model_id=model_id,
        name=f"name of {model_id}",
        source=f"s3://bucket/{model_id}",
        manifest=Manifest(shards=tuple(shards)),
        versions={shard.name: f'"{shard.name}"' for shard in shards} if versions else {},
    )
    return made.with_digests(made.by_shard(digests(made))) if bound else made


def right(checkpoint: Checkpoint, position: int) -> bytes:
    """What belongs at a position; the same in every model that has as many bytes there."""
    return content(checkpoint.place(position)[2], position)


def digests(checkpoint: Checkpoint) -> list[str]:
    return [chunk_digest(right(checkpoint, position)) for position in range(checkpoint.positions)]


class Told:
    """Implements ports.Events."""

    def __init__(self) -> None:
        self.all: list[tuple[tuple[str, str], str, dict[str, Any]]] = []

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.all.append((event, subject, data))

    def of(self, *events: tuple[str, str]) -> list[tuple[str, dict[str, Any]]]:
        return [(subject, data) for event, subject, data in self.all if event in events]


class Disk:
    """Implements ports.Disk, but for its start. faults: operation → what its next calls raise, in order; None: nothing."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int], bytearray] = {}
        self.chunks: dict[str, bytes] = {}
        self.kept: dict[str, Checkpoint] = {}
        self.learnt: dict[str, dict[int, str]] = defaultdict(dict)
        self.opened: set[Part] = set()
        self.faults: dict[str, list[StokerError | None]] = defaultdict(list)
        self.done: list[str] = []

    async def does(self, operation: str) -> None:
        await asyncio.sleep(0)
        self.done.append(operation)
        error = self.faults[operation].pop(0) if self.faults[operation] else None
        if error is not None:
            raise error

    def folder(self, model_id: str) -> Path:
        return Path("/ssd/models") / model_id

    def chunk(self, digest: str) -> Path:
        return Path("/ssd/chunks") / digest

    async def keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        await self.does("keep")
        assert files is not None or checkpoint.model_id in self.kept
        self.kept[checkpoint.model_id] = checkpoint

    async def touch(self, model_id: str) -> None:
        await self.does("touch")

    async def learn(self, model_id: str, position: int, digest: str) -> None:
        await self.does("learn")
        self.learnt[model_id][position] = digest

    async def part(self, model_id: str, position: int) -> Part:
        await self.does("part")
        return Part(self, (model_id, position))

    async def remove(self, digest: str) -> None:
        await self.does("remove")
        self.chunks.pop(digest, None)


class Part:
    """Implements ports.Part, and what SsdPart asks of who uses it."""

    def __init__(self, disk: Disk, key: tuple[str, int]) -> None:
        self._disk, self._key, self._busy = disk, key, False
        self._data = disk.parts.setdefault(key, bytearray())
        assert all(part._key != key for part in disk.opened), f"{key} is open twice"
        disk.opened.add(self)

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    async def _does(self, operation: str) -> None:
        assert self in self._disk.opened, "it is closed"
        assert not self._busy, "one call at a time"
        self._busy = True
        try:
            await self._disk.does(operation)
        except asyncio.CancelledError:
            for _ in range(3):  # its thread is not stopped at once
                await asyncio.sleep(0)
            raise
        finally:
            self._busy = False

    async def read(self, into: memoryview) -> None:
        assert len(into) <= len(self._data)
        await self._does("read")
        into[:] = self._data[: len(into)]

    async def write(self, data: memoryview) -> None:
        assert len(data), "nothing to write"
        assert len(self._data) % 4096 == 0, "only the last piece of a chunk has any length"
        try:
            await self._does("write")
        except StokerError:
            self._data += data[:4096]  # a disk that is full took some of it
            raise
        self._data += data

    async def finish(self, digest: str) -> None:
        await self._does("finish")
        assert chunk_digest(bytes(self._data)) == digest, "a chunk's name is the digest of its bytes"
        self._disk.chunks[digest] = bytes(self._data)
        self._disk.parts.pop(self._key, None)
        self.close()

    async def discard(self) -> None:
        self.close()
        self._disk.parts.pop(self._key, None)
        await self._disk.does("discard")

    def close(self) -> None:
        assert not self._busy, "it is being written to"
        self._disk.opened.discard(self)


class Filling:
    """Implements ports.Filling for who fills it. published: the bytes as they were then."""

    def __init__(self, checkpoint: Checkpoint, *, files: Iterable[int] = (), window_chunks: int = 0) -> None:
        self._checkpoint, self._window = checkpoint, window_chunks
        chunks = window_chunks or checkpoint.positions
        most = max(checkpoint.place(position)[2] for position in range(checkpoint.positions))
        self._chunks = [bytearray(most) for _ in range(chunks)]
        self._files, self._failed = set(files), asyncio.Queue[tuple[int, StokerError] | None]()
        self.published: dict[int, bytes] = {}
        self.failed: list[int] = []
        self.released = 0
        if not self._files:
            self._failed.put_nowait(None)

    def buffer(self, position: int) -> memoryview:
        assert self.window_open(position)
        _, _, size_bytes = self._checkpoint.place(position)
        return memoryview(self._chunks[position % len(self._chunks)])[:size_bytes]

    def window_open(self, position: int) -> bool:
        return not self._window or position < self.released + self._window

    def publish(self, position: int) -> None:
        assert position not in self.published, f"{position} is published already"
        self.published[position] = bytes(self.buffer(position))

    def release(self, position: int) -> None:
        self.released = position

    def fail(self, position: int) -> None:
        self.failed.append(position)

    async def next_failed(self) -> tuple[int, StokerError] | None:
        failed = await self._failed.get()
        if failed is None:
            self._failed.put_nowait(None)  # for whoever asks next
        return failed

    def read(self, position: int, error: StokerError | None = None) -> None:
        """A position of a file was read, or cannot be."""
        self._files.remove(position)
        if error is None:
            self.buffer(position)[:] = right(self._checkpoint, position)
            self.publish(position)
        else:
            self._failed.put_nowait((position, error))
        if not self._files:
            self._failed.put_nowait(None)

"""A node's disk: what lies on it outlives the agent, and most of it the machine."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.plan import ALIGN_BYTES
from stoker_contracts.models import Tier
from stoker_core.errors import ReadFailed, StorageFailed, TierFull
from stoker_sim.dice import Dice
from stoker_sim.loop import PROCESS, Process, crash_point
from stoker_sim.store.faults import NONE, Faults
from stoker_sim.store.flaws import Flaws
from stoker_storeagent.ports import DiskContents
from stoker_storeagent.records import Checkpoint

CALL_S = 0.001
CHUNK_LOST, LEARNT_LOST = 0.2, 0.3
"""With the power, of those that nobody synced."""


@dataclass
class Folder:
    checkpoint: Checkpoint
    small: dict[str, bytes]
    used_s: float
    learnt: dict[int, str] = field(default_factory=dict)


class SimDisk:
    """Implements ports.Disk. `faults` may change at any time.

    capacity_bytes: of the file system, which may be less than the tier was told.
    """

    def __init__(self, root: Path, capacity_bytes: int, dice: Dice, flaws: Flaws) -> None:
        self._root, self._capacity_bytes, self._dice, self._flaws = root, capacity_bytes, dice, flaws
        self.faults: Faults = NONE
        self.chunks: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytearray] = {}
        self.folders: dict[str, Folder] = {}
        self._unsynced: set[str] = set()
        self.stuck: set[str] = set()
        """Chunks that could not be removed: the next agent tries again."""
        self.writers: dict[tuple[str, int], Process | None] = {}

    @property
    def used_bytes(self) -> int:
        return sum(map(len, self.chunks.values())) + sum(map(len, self.parts.values()))

    async def pause(self, mean_s: float = CALL_S) -> None:
        await asyncio.sleep(self._dice.delay_s(mean_s))
        crash_point()

    # What happens to it.

    def lose_power(self) -> None:
        self.parts.clear()
        self.writers.clear()
        for digest in sorted(self._unsynced & self.chunks.keys()):
            if self._dice.chance(CHUNK_LOST):
                del self.chunks[digest]
        self._unsynced.clear()
        for folder in self.folders.values():
            folder.learnt = {at: of for at, of in folder.learnt.items() if not self._dice.chance(LEARNT_LOST)}

    def rot(self) -> None:
        """A bit of some chunk changes."""
        if self.chunks:
            self._rot(self._dice.choice(sorted(self.chunks)))

    # The port.

    async def open(self) -> DiskContents:
        await self._call()
        self.writers.clear()
        for model_id, position in list(self.parts):
            folder = self.folders.get(model_id)
            digest = folder.learnt.get(position) or folder.checkpoint.digest(position) if folder else ""
            if folder is None or digest in self.chunks:
                del self.parts[model_id, position]
        return DiskContents(
            checkpoints=tuple(folder.checkpoint for folder in self.folders.values()),
            used_s={model_id: folder.used_s for model_id, folder in self.folders.items()},
            chunks={digest: len(data) for digest, data in self.chunks.items()},
            learnt={
                model_id: {at: of for at, of in folder.learnt.items() if of in self.chunks}
                for model_id, folder in self.folders.items()
                if folder.learnt and not folder.checkpoint.bound
            },
        )

    async def free_bytes(self) -> int:
        await self._call()
        return self._capacity_bytes - self.used_bytes

    def folder(self, model_id: str) -> Path:
        return self._root / "models" / model_id

    def chunk(self, digest: str) -> Path:
        return self._root / "chunks" / digest

    async def keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        await self._call(len(checkpoint.model_id))
        before = self.folders.get(checkpoint.model_id)
        if before is None:
            if files is None:
                raise StorageFailed(str(self.folder(checkpoint.model_id)), "no such folder")
            self.folders[checkpoint.model_id] = Folder(checkpoint, dict(files), asyncio.get_running_loop().time())
        else:
            before.checkpoint = checkpoint
            before.small = dict(files) if files is not None else before.small
            if checkpoint.bound:
                before.learnt = {}
        await self.pause()

    async def forget(self, model_id: str) -> None:
        await self._call()
        self.folders.pop(model_id, None)
        for key in [key for key in self.parts if key[0] == model_id]:
            del self.parts[key]

    async def touch(self, model_id: str) -> None:
        await self._call()
        if model_id in self.folders:
            self.folders[model_id].used_s = asyncio.get_running_loop().time()

    async def learn(self, model_id: str, position: int, digest: str) -> None:
        await self._call(1)
        folder = self.folders.get(model_id)
        if folder is None:
            raise StorageFailed(str(self.folder(model_id)), "no such folder")
        folder.learnt[position] = digest
        await self.pause()

    async def part(self, model_id: str, position: int) -> SimPart:
        await self._call(1)
        key = (model_id, position)
        writer = self.writers.get(key)
        self._flaws.require(writer is None or not writer.alive, f"two write the part {position} of {model_id}")
        self.writers[key] = PROCESS.get()
        return SimPart(self, key, self.parts.setdefault(key, bytearray()))

    async def remove(self, digest: str) -> None:
        self.stuck.add(digest)
        await self._call()
        self.stuck.discard(digest)
        self.chunks.pop(digest, None)
        self._unsynced.discard(digest)

    async def intact(self, digest: str) -> bool:
        await self.pause()
        return digest in self.chunks and chunk_digest(self.chunks[digest]) == digest

    async def open_chunk(self, digest: str) -> int:
        await self._call()
        if digest not in self.chunks:
            raise StorageFailed(str(self.chunk(digest)), "no such file")
        fd = os.memfd_create("sim-chunk", os.MFD_CLOEXEC)
        os.pwrite(fd, self.chunks[digest], 0)
        return fd

    # For loads and parts.

    def read_chunk(self, path: Path) -> bytes:
        """As the kernel reads it. Raises ReadFailed."""
        if self._dice.chance(self.faults.read_error):
            raise ReadFailed(str(path), 0, errno.EIO)
        if path.name not in self.chunks:
            raise ReadFailed(str(path), 0, errno.ENOENT)
        return self.chunks[path.name]

    async def write(self, key: tuple[str, int], part: bytearray, data: memoryview) -> None:
        """Page by page: whoever dies meanwhile leaves a beginning."""
        while data:
            page, data = data[:ALIGN_BYTES], data[ALIGN_BYTES:]
            await self._call(len(page))
            part += page

    async def finish(self, key: tuple[str, int], part: bytearray, digest: str) -> None:
        try:
            await self._call(1)
        except StorageFailed:
            self._unlink(key, part)
            raise
        self._flaws.require(
            chunk_digest(bytes(part)) == digest, f"part {key} was finished and is not what it is called"
        )
        self._unlink(key, part)
        if len(self.chunks.get(digest, b"")) != len(part):
            self.chunks[digest] = bytes(part)
            self._unsynced.add(digest)
            if self._dice.chance(self.faults.rot):
                self._rot(digest)
        await self.pause()

    async def discard(self, key: tuple[str, int], part: bytearray) -> None:
        await self._call()
        self._unlink(key, part)

    def closed(self, key: tuple[str, int]) -> None:
        self.writers.pop(key, None)

    def _unlink(self, key: tuple[str, int], part: bytearray) -> None:
        if self.parts.get(key) is part:
            del self.parts[key]

    def _rot(self, digest: str) -> None:
        data = bytearray(self.chunks[digest])
        data[self._dice.below(len(data))] ^= 1 << self._dice.below(8)
        self.chunks[digest] = bytes(data)

    async def _call(self, writes_bytes: int = 0) -> None:
        """Raises StorageFailed; TierFull if something is to be written and there is no room."""
        await self.pause()
        if writes_bytes:
            full = self.used_bytes + writes_bytes > self._capacity_bytes
            if full or self._dice.chance(self.faults.disk_full):
                raise TierFull(Tier.SSD, writes_bytes, 0)
        if self._dice.chance(self.faults.disk_error):
            raise StorageFailed(str(self._root), "the disk failed")


class SimPart:
    """Implements ports.Part."""

    def __init__(self, disk: SimDisk, key: tuple[str, int], data: bytearray) -> None:
        self._disk, self._key, self._data = disk, key, data
        self._open = True

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    async def read(self, into: memoryview) -> None:
        await self._disk.pause()
        into[:] = self._data[: len(into)]

    async def write(self, data: memoryview) -> None:
        assert self._open, "it is closed"
        await self._disk.write(self._key, self._data, data)

    async def finish(self, digest: str) -> None:
        assert self._open, "it is closed"
        await self._disk.finish(self._key, self._data, digest)
        self.close()

    async def discard(self) -> None:
        self.close()
        await self._disk.discard(self._key, self._data)

    def close(self) -> None:
        crash_point()
        if self._open:
            self._open = False
            self._disk.closed(self._key)

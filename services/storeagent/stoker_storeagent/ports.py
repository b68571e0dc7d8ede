"""What the storage agent's logic needs of the world: memory, disk, sources, peers, the catalogue. Simulated ones exist too.

Nothing behind these ports blocks the event loop, and cancelling a call stops its work before the call returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stoker_checkpoint.manifest import Manifest
from stoker_contracts.control import HeldModel, LinkStatus, Located, TierStatus
from stoker_contracts.models import Tier
from stoker_core.errors import StokerError
from stoker_storeagent.records import Checkpoint

OnProgress = Callable[[int, int], Awaitable[None]]
"""(done_bytes, total_bytes), at most ten times a second."""
OnBytes = Callable[[int], None]
"""How many bytes of what was asked for are there so far; ascending."""


# What others see of this service.


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A model under lease: its folder, and its weights in the pool, there or on their way.

    source: where the weights were when they were asked for.  origin: of remote and peer: the kind of source, or the node.
    wait_ms: from the request until it could be used.  descriptors: of the pool and of the load's board, and with `ring` of a
    ring on the device that was asked for and of its board; valid while the lease lasts.
    """

    model_id: str
    path: Path
    source: Tier
    total_bytes: int
    wait_ms: float
    descriptors: tuple[int, ...]
    origin: str = ""
    ring: bool = False


class Store(Protocol):
    """Brings models to this node and keeps them while they are leased."""

    def lease(
        self, model_id: str, instance_id: str, on_progress: OnProgress, *, device: str
    ) -> AbstractAsyncContextManager[Held]:
        """Enter: begin to bring the weights into memory unless they are there. Nothing evicts them until exit.

        What fails after that is the board's to tell.
        device: UUID of the GPU that the weights are for, where a ring is made if one can be had; empty: none is.
        Raises ModelNotFound, RefusedCheckpoint, PoolExhausted, StorageFailed, DatabaseUnavailable, SourceUnavailable,
        SourceDenied, Overloaded, Stopping.
        """
        ...

    def observe_load(self, held: Held, read_bytes: int, load_ms: float) -> None:
        """An instance has read a leased model."""
        ...


class Tiers(Protocol):
    """What a node's tiers hold, for those who report it and keep it in order."""

    def held(self) -> list[HeldModel]:
        """Per tier, the fastest first, the most recently used first; also what is there in part."""
        ...

    def models(self) -> set[str]:
        """All of which something is kept, if only the folder."""
        ...

    def status(self) -> tuple[TierStatus, ...]: ...

    def links(self) -> tuple[LinkStatus, ...]: ...

    async def bind_waiting(self) -> None:
        """Bind digests that could not be bound when they were known. Raises DatabaseUnavailable."""
        ...

    async def drop(self, model_id: str, reason: str, *, tier: Tier | None = None) -> bool:
        """Remove a model from a tier (None: from all) unless it is leased. Returns whether nothing of it is left there."""
        ...


# Memory.


class Filling(Protocol):
    """A load whose positions come from files of the disk or from its owner's hands. Source: `stoker_checkpoint.filling`."""

    @property
    def pool_fd(self) -> int: ...
    @property
    def board_fd(self) -> int: ...
    @property
    def chunks(self) -> tuple[int, ...]: ...

    def buffer(self, position: int) -> memoryview:
        """The position's bytes in the pool, writable; of exactly the position's size."""
        ...

    def window_open(self, position: int) -> bool:
        """Whether the position's chunk may be written to: always, unless it streams through a window."""
        ...

    def is_ready(self, position: int) -> bool: ...

    async def ready(self, position: int) -> bool:
        """Until the position is ready (True), or the load ended without it (False)."""
        ...

    async def next_failed(self) -> tuple[int, StokerError] | None:
        """A position of a file that cannot be read or has another digest: it is the owner's to write now.

        None once every position of a file was published or given back so, and when the load has ended.
        """
        ...

    def publish(self, position: int) -> None:
        """What the owner wrote is right, and final. Nothing happens if the load has ended."""
        ...

    def release(self, position: int) -> None:
        """For an owner who is his own consumer: done with all positions below this one."""
        ...

    def fail(self, position: int) -> None:
        """End the load: what belongs at this position cannot be had."""
        ...

    def cancel(self) -> None: ...

    async def wait(self) -> None:
        """Until it is done. Raises as it ended: ReadFailed, SourceUnavailable, LoadCancelled."""
        ...

    async def aclose(self) -> None:
        """Cancel it if need be and give its chunks back. Raises ReadFailed if a disk does not answer; they are lost then."""
        ...


class Memory(Protocol):
    """The node's pool."""

    @property
    def chunks_total(self) -> int: ...

    def fill(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        files: Mapping[int, tuple[Path, str]],
        *,
        window_chunks: int = 0,
        chunks: Sequence[int] | None = None,
        priority: int = 0,
    ) -> Filling:
        """files: of the positions that are read from the disk, each chunk's file and the digest that it has to have.

        chunks: of the pool, allocated already, by position; None: it allocates them.
        Raises PoolExhausted, StorageFailed.
        """
        ...

    def free(self, chunks: Sequence[int]) -> None:
        """Chunks that no load has: those of loads which an agent before this one left."""
        ...


# The disk.


class Part(Protocol):
    """One chunk on its way to the disk. What it has survives this process."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the chunk's beginning that are there."""
        ...

    async def read(self, into: memoryview) -> None:
        """The first len(into) bytes, at most size_bytes. Raises StorageFailed."""
        ...

    async def write(self, data: memoryview) -> None:
        """Append. data: a multiple of 4096 bytes but for the chunk's last. Raises TierFull if the disk is, StorageFailed."""
        ...

    async def finish(self, digest: str) -> None:
        """It is complete: put it on the disk under its digest's name. Raises TierFull, StorageFailed."""
        ...

    async def discard(self) -> None: ...

    def close(self) -> None:
        """Idempotent; what was written stays for the next who opens it."""
        ...


class DiskContents(msgspec.Struct, frozen=True, kw_only=True):
    """What a start found. learnt: model → position → digest, of those whose digests are not bound."""

    checkpoints: tuple[Checkpoint, ...]
    used_s: dict[str, float]  # when each was used last, in seconds of the file system's clock
    chunks: dict[str, int]  # digest → bytes
    learnt: dict[str, dict[int, str]]


class Disk(Protocol):
    """The SSD tier's directory: chunks by digest, and a folder for each model. All raise StorageFailed; what writes, TierFull."""

    async def open(self) -> DiskContents: ...

    async def free_bytes(self) -> int: ...

    def folder(self, model_id: str) -> Path: ...

    def chunk(self, digest: str) -> Path: ...

    async def keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        """Make or replace a model's folder: its small files and its manifest. It is complete from the moment it has its name.

        files: None: they are those that the folder has, and it is there.
        """
        ...

    async def forget(self, model_id: str) -> None:
        """Remove a model's folder and its parts; its chunks stay. No-op if there is none."""
        ...

    async def touch(self, model_id: str) -> None:
        """Note that it was used now. No-op if there is none."""
        ...

    async def learn(self, model_id: str, position: int, digest: str) -> None:
        """Note the digest of a chunk of a model whose digests are not bound yet."""
        ...

    async def part(self, model_id: str, position: int) -> Part: ...

    async def remove(self, digest: str) -> None:
        """Remove a chunk. No-op if there is none."""
        ...

    async def open_chunk(self, digest: str) -> int:
        """A descriptor of a chunk, the caller's to close. It keeps the bytes, whatever becomes of the name."""
        ...

    async def intact(self, digest: str) -> bool:
        """Read a chunk, and hold it against its name. False also if it cannot be read or is missing."""
        ...


# Where chunks come from.


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint at its source, as registration sees it: headers and small files were read, weights were not.

    source: the URL, in the one form that is kept.  versions: shard → what the source calls its present contents (S3: the
    ETag); empty where it has no such thing.
    """

    source: str
    manifest: Manifest
    config: dict[str, Any]
    small_files: dict[str, bytes]
    versions: dict[str, str]


class Source(Protocol):
    """One kind of source, by the scheme of its URLs."""

    @property
    def kind(self) -> str:
        """As events and observations name it: file, s3."""
        ...

    async def inspect(self, url: str) -> Inspected:
        """Raises RefusedCheckpoint, CorruptCheckpoint, SourceUnavailable, SourceDenied."""
        ...

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        """Fill `into` with a shard's bytes from `offset` on. One try: who asks may go on where it broke off.

        Raises CheckpointChanged if the source has another version or too few bytes, RefusedCheckpoint if the shard is gone,
        SourceDenied, SourceUnavailable.
        """
        ...


class Peers(Protocol):
    """Other nodes' storage agents."""

    async def locate(self, model_id: str, wanted: Sequence[str] = ()) -> list[Located]:
        """Who can give chunks of a model now, by node; bounded in time, so it may miss some.

        wanted: nodes to ask though nothing was heard of the model there.
        """
        ...

    async def read(
        self, located: Located, model_id: str, position: int, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> str:
        """Fill `into` with a chunk's bytes from `offset` on; returns the digest that the peer knows for all of it.

        Raises NotHeld if it does not come by this chunk in time, PeerFailed.
        """
        ...

    def links(self) -> tuple[LinkStatus, ...]:
        """What was seen of the ways to peers since the start, by node."""
        ...

    def suspect(self, node: str, reason: str) -> None:
        """It broke off, or gave wrong bytes: leave it out of `locate` for a while, and say so."""
        ...


class ServedChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that may be sent: `size_bytes` of `fd` from `offset_bytes` on, unchanging while it is held."""

    fd: int
    offset_bytes: int
    size_bytes: int
    digest: str


class Served(Protocol):
    """What this node gives to peers."""

    def chunk(self, model_id: str, position: int, *, wait_s: float) -> AbstractAsyncContextManager[ServedChunk]:
        """Waits for a chunk that is on its way. Raises NotHeld."""
        ...

    def located(self, model_id: str) -> Located | None:
        """None: nothing of it is here, or on its way."""
        ...


# The rest.


class Catalogue(Protocol):
    """Which models exist, and what their files must be."""

    async def find(self, model_id: str) -> tuple[Checkpoint, Mapping[str, bytes]]:
        """A model and the contents of its small files. Raises ModelNotFound, DatabaseUnavailable, RefusedCheckpoint."""
        ...

    async def bind(self, model_id: str, digests: Mapping[str, Sequence[str]]) -> None:
        """Fix the digests of every shard's chunks on their first arrival.

        Raises CorruptCheckpoint if others are fixed, DatabaseUnavailable.
        """
        ...


class Events(Protocol):
    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None: ...

"""Pinned memory that checkpoints are read into, and the reader that does it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from stoker_checkpoint import _native
from stoker_checkpoint.digests import require_digests
from stoker_checkpoint.filling import Extent, Filling, NativeFile, chunk_files
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan, check_whole_chunks, shards_of
from stoker_checkpoint.pool_load import PoolLoad
from stoker_checkpoint.readers import Asked, Engine, Readers
from stoker_checkpoint.reading import Reading
from stoker_core.errors import InvalidMessage, InvalidRequest, InvalidSettings, NativeUnavailable, PoolExhausted

if TYPE_CHECKING:
    from stoker_checkpoint.probe import ProbeResult

_Opened = TypeVar("_Opened", bound=PoolLoad)


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool lies in memory, and how it is read into.

    warm: faulted, so that no load waits for it.  pages: hugetlb, collapsed or small.  collapse_errno, lock_errno: why
    the kernel refused huge or locked pages; 0: it did not.
    reader: the engine of the next load.  reader_reason: why it is not io_uring; empty if it is, or by choice.
    direct: whether all loads that are open pass the page cache by; None if none is open.
    """

    total_bytes: int
    free_bytes: int
    warm_bytes: int
    huge_bytes: int
    locked_bytes: int
    pages: str
    collapse_errno: int
    lock_errno: int
    reader: Engine
    reader_reason: str
    registered_buffers: bool | None
    direct: bool | None


class Pool:
    """Chunks of one memfd. Threads fault, collapse and lock them in the background from the start on.

    Methods may be called from any thread; none waits for a disk but `close`.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        huge: str = "auto",
        lock: bool = True,
        fault_threads: int = 2,
        reader: Asked = "auto",
        register_cuda: bool = False,
    ) -> None:
        """size_bytes: rounded down to chunks.  huge: auto | hugetlb | collapse | none.

        reader: auto is io_uring where the kernel gives it, else threads, until `use` says otherwise.
        Raises InvalidSettings for less than one chunk, NativeUnavailable if the kernel refuses the memory.
        """
        if size_bytes < CHUNK_BYTES:
            raise InvalidSettings(f"a pool of {size_bytes} bytes is smaller than one chunk of {CHUNK_BYTES}")
        try:
            native = _native.Pool(
                size_bytes // CHUNK_BYTES,
                huge=huge,
                lock=lock,
                fault_threads=fault_threads,
                register_cuda=register_cuda,
            )
        except OSError as error:
            raise NativeUnavailable(f"a pool of {size_bytes} bytes cannot be made: {error}") from error
        self._open(native, reader)

    @classmethod
    def adopt(
        cls,
        fd: int,
        used: Sequence[int],
        *,
        lock: bool = True,
        fault_threads: int = 2,
        reader: Asked = "auto",
        register_cuda: bool = False,
    ) -> Self:
        """Take over the pool behind `fd`, which stays the caller's. The chunks `used` stay allocated.

        Raises InvalidMessage if it is no pool, or has no such chunks.
        """
        try:
            native = _native.Pool.adopt(fd, used, lock=lock, fault_threads=fault_threads, register_cuda=register_cuda)
        except (ValueError, OSError) as error:
            raise InvalidMessage(f"the descriptor is no pool: {error}") from error
        pool = cls.__new__(cls)
        pool._open(native, reader)
        return pool

    def _open(self, native: _native.Pool, reader: Asked) -> None:
        self.native = native
        self.reader_fd = native.reader_fd()
        """Read-only, for consumers; closed with the pool."""
        self._lock = threading.Lock()
        self._readers = Readers(native, reader)
        self._loads: weakref.WeakSet[PoolLoad] = weakref.WeakSet()
        self._closed = False

    def use(self, result: ProbeResult) -> None:
        """Read later loads by the engine that was faster, unless one was asked for by name."""
        self._readers.use(result.faster)

    def status(self) -> PoolStatus:
        native, readers = self.native, self._readers
        with self._lock:
            loads = list(self._loads)
        direct = [load.direct for load in loads]  # without the lock: others may begin meanwhile
        return PoolStatus(
            total_bytes=native.chunks_total * CHUNK_BYTES,
            free_bytes=native.chunks_free * CHUNK_BYTES,
            warm_bytes=native.chunks_warm * CHUNK_BYTES,
            huge_bytes=native.chunks_huge * CHUNK_BYTES,
            locked_bytes=native.chunks_locked * CHUNK_BYTES,
            pages=native.pages,
            collapse_errno=native.collapse_errno,
            lock_errno=native.lock_errno,
            reader=readers.engine,
            reader_reason=readers.reason,
            registered_buffers=readers.registered_buffers,
            direct=all(direct) if direct else None,
        )

    def wait_warm(self, timeout_s: float) -> bool:
        """Whether every chunk has been faulted within that time."""
        return self.native.wait_warm(timeout_s)

    def chunk(self, index: int) -> memoryview:
        return self.native.chunk(index)

    def read(
        self,
        plan: ReadPlan,
        manifest: Manifest,
        directory: Path,
        *,
        window_chunks: int = 0,
        verify: bool = False,
        priority: int = 0,
    ) -> Reading:
        """Begin to read; returns at once. The reading must be closed.

        directory: where the shards lie.  window_chunks: stream through so many chunks, one consumer and in order; 0, or
        as many as the plan has positions: the load lies in the pool whole.  verify: against the manifest's digests.
        priority: higher first, else by arrival.
        Raises PoolExhausted; InvalidRequest for a plan of another manifest, and for `verify` without digests or with a
        plan of less than whole chunks; NativeUnavailable if the engine asked for, a descriptor or a thread cannot be had.
        """
        shards = shards_of(plan, manifest)
        if verify:
            for shard in shards:
                require_digests(shard, "verify")
            check_whole_chunks(plan, shards, "verify")
        load, chunks = self._start(
            plan,
            [(str(directory / shard.name), shard.size_bytes, shard.mtime_ns) for shard in shards],
            plan.extents,
            window=window_chunks,
            hold=verify,
            priority=priority,
        )
        return self._opened(Reading(self, load, chunks, plan, shards, directory), verify)

    def fill(
        self,
        plan: ReadPlan,
        manifest: Manifest,
        files: Mapping[int, Path],
        *,
        directory: Path,
        window_chunks: int = 0,
        chunks: Sequence[int] | None = None,
        priority: int = 0,
    ) -> Filling:
        """Begin a load whose positions come from `files` and from whoever calls; returns at once. It must be closed.

        files: position → a file that holds that chunk and nothing else; each is held against the manifest's digest. All
        other positions are the caller's to write and publish.  directory: of the shards, for messages.
        chunks: of this pool, by position, allocated already: they are the filling's once this returns; None: it allocates.
        window_chunks: as of `read`; not with `chunks`.  priority: higher first, else by arrival.
        Raises PoolExhausted; InvalidRequest for a plan of another manifest or of less than whole chunks, for a file of
        no position or without a digest, and for chunks that do not fit; NativeUnavailable as `read`.
        """
        shards = shards_of(plan, manifest)
        check_whole_chunks(plan, shards, "plan")
        sources, extents = chunk_files(plan, shards, files)
        if chunks is not None and (window_chunks or len(chunks) != len(plan.positions)):
            raise InvalidRequest("chunks that are given must be one for each position, without a window", "chunks")
        load, chunks = self._start(
            plan, sources, extents, window=window_chunks, chunks=chunks, recover=True, priority=priority
        )
        return self._opened(Filling(self, load, chunks, plan, shards, directory, files), bool(files))

    def _start(
        self,
        plan: ReadPlan,
        files: Sequence[NativeFile],
        extents: Sequence[Extent],
        *,
        window: int,
        chunks: Sequence[int] | None = None,
        hold: bool = False,
        recover: bool = False,
        priority: int,
    ) -> tuple[_native.Load, Sequence[int]]:
        """The load, and its chunks: `chunks`, or else new ones."""
        positions = len(plan.positions)
        window = window if 0 < window < positions else 0
        reader = self._reader()
        allocated = self.native.allocate(window or positions) if chunks is None else []
        if allocated is None:
            raise PoolExhausted((window or positions) * CHUNK_BYTES, self.native.chunks_free * CHUNK_BYTES)
        used = allocated if chunks is None else chunks
        try:
            load = reader.start(
                files,
                extents,
                [used[position % len(used)] for position in range(positions)],
                window=window,
                hold=hold,
                recover=recover,
                priority=priority,
            )
        except BaseException as error:
            self.native.free(allocated)
            if isinstance(error, ValueError):
                raise InvalidRequest(f"the plan does not fit: {error}") from error
            if isinstance(error, OSError):
                raise NativeUnavailable(f"a load cannot begin: {error}") from error
            raise
        return load, used

    def _opened(self, load: _Opened, verify: bool) -> _Opened:
        with self._lock:
            self._loads.add(load)
        try:
            if verify:
                load.verify()
        except RuntimeError as error:
            load.close()
            raise NativeUnavailable(f"a load cannot be verified: {error}") from error
        return load

    def free(self, load: PoolLoad, chunks: Sequence[int]) -> None:
        """For the load alone: it has ended."""
        with self._lock:
            self._loads.discard(load)
        self.native.free(chunks)

    def close(self) -> None:
        """Cancel and close every load, then let go of the memory; it goes with its last consumer. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loads = list(self._loads)
        for load in loads:
            load.close()
        self._readers.close()
        self.native.close()
        os.close(self.reader_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _reader(self) -> _native.Reader:
        with self._lock:
            if self._closed:
                raise ValueError("the pool is closed")
            return self._readers.current()

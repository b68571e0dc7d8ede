"""Pinned memory that checkpoints are read into, and the reader that does it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from stoker_checkpoint import _native
from stoker_checkpoint.header import Shard, shown
from stoker_checkpoint.manifest import Manifest, is_plain_name
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan
from stoker_checkpoint.reading import Reading
from stoker_core.errors import InvalidMessage, InvalidRequest, InvalidSettings, NativeUnavailable, PoolExhausted

if TYPE_CHECKING:
    from stoker_checkpoint.probe import ProbeResult

Engine = Literal["io_uring", "threads"]

DEPTH_AND_BLOCK_BYTES: dict[str, tuple[int, int]] = {"io_uring": (32, 4 * 2**20), "threads": (4, 16 * 2**20)}
"""Reads in flight and bytes of each. Measured on a virtual NVMe disk, GB/s: io_uring 8 × 4 MiB 2.6, 16 × 4 2.9, 32 × 4 2.9;
threads 4 × 8 MiB 2.75, 4 × 16 2.9. Twice as much gains nothing."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool lies in memory, and how it is read into.

    warm: faulted, so that no load waits for it.  pages: hugetlb, collapsed or small.  collapse_errno, lock_errno: why
    the kernel refused huge or locked pages; 0: it did not.
    reader: the engine of the next load.  reader_reason: why it is not io_uring; empty if it is, or by choice.
    direct: whether all readings that are open pass the page cache by; None if none is open.
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
        reader: Literal["auto"] | Engine = "auto",
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
        reader: Literal["auto"] | Engine = "auto",
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

    def _open(self, native: _native.Pool, reader: Literal["auto"] | Engine) -> None:
        self.native = native
        self.reader_fd = native.reader_fd()
        """Read-only, for consumers; closed with the pool."""
        self._asked = reader
        self._lock = threading.Lock()
        self._faster: Engine = "io_uring"
        self._readers: dict[Engine, _native.Reader] = {}
        self._readings: weakref.WeakSet[Reading] = weakref.WeakSet()
        self._closed = False
        refused = _native.io_uring_errno()
        self._uring_reason = os.strerror(refused) if refused else ""

    def use(self, result: ProbeResult) -> None:
        """Read later loads by the engine that was faster, unless one was asked for by name."""
        self._faster = result.faster

    def status(self) -> PoolStatus:
        native, engine = self.native, self._engine()
        reader = self._readers.get(engine)
        with self._lock:
            readings = list(self._readings)
        direct = [reading.direct for reading in readings]
        return PoolStatus(
            total_bytes=native.chunks_total * CHUNK_BYTES,
            free_bytes=native.chunks_free * CHUNK_BYTES,
            warm_bytes=native.chunks_warm * CHUNK_BYTES,
            huge_bytes=native.chunks_huge * CHUNK_BYTES,
            locked_bytes=native.chunks_locked * CHUNK_BYTES,
            pages=native.pages,
            collapse_errno=native.collapse_errno,
            lock_errno=native.lock_errno,
            reader=engine,
            reader_reason=self._uring_reason if engine == "threads" else "",
            registered_buffers=reader.registered_buffers if reader else None,
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
        shards = _shards(plan, manifest)
        if verify:
            _check_verifiable(plan, shards)
        positions = len(plan.positions)
        window = window_chunks if 0 < window_chunks < positions else 0
        reader = self._reader()
        chunks = self.native.allocate(window or positions)
        if chunks is None:
            raise PoolExhausted((window or positions) * CHUNK_BYTES, self.native.chunks_free * CHUNK_BYTES)
        try:
            load = reader.start(
                [(str(directory / shard.name), shard.size_bytes, shard.mtime_ns) for shard in shards],
                plan.extents,
                [chunks[position % len(chunks)] for position in range(positions)],
                window=window,
                hold=verify,
                priority=priority,
            )
        except BaseException as error:
            self.native.free(chunks)
            if isinstance(error, ValueError):
                raise InvalidRequest(f"the plan does not fit: {error}") from error
            if isinstance(error, OSError):
                raise NativeUnavailable(f"a load cannot begin: {error}") from error
            raise
        reading = Reading(self, load, chunks, plan, directory)
        with self._lock:
            self._readings.add(reading)
        try:
            if verify:
                reading.verify(shards)
        except RuntimeError as error:
            reading.close()
            raise NativeUnavailable(f"a load cannot be verified: {error}") from error
        return reading

    def free(self, reading: Reading, chunks: Sequence[int]) -> None:
        """For the reading alone: its load has ended."""
        with self._lock:
            self._readings.discard(reading)
        self.native.free(chunks)

    def close(self) -> None:
        """Cancel and close every reading, then let go of the memory; it goes with its last consumer. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            readings = list(self._readings)
        for reading in readings:
            reading.close()
        for reader in self._readers.values():
            reader.close()
        self.native.close()
        os.close(self.reader_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _engine(self) -> Engine:
        if self._asked != "auto":
            return self._asked
        return "threads" if self._uring_reason else self._faster

    def _reader(self) -> _native.Reader:
        with self._lock:
            if self._closed:
                raise ValueError("the pool is closed")
            engine = self._engine()
            if engine not in self._readers:
                try:
                    self._readers[engine] = make_reader(self.native, engine)
                except OSError as error:
                    if self._asked != "auto" or engine == "threads":
                        raise NativeUnavailable(f"the reader {engine} cannot be had: {error}") from error
                    self._uring_reason = error.strerror or str(error)
                    engine = "threads"
                    self._readers[engine] = make_reader(self.native, engine)
            return self._readers[engine]


def make_reader(pool: _native.Pool, engine: Engine) -> _native.Reader:
    """Raises OSError if the kernel refuses the engine."""
    depth, block_bytes = DEPTH_AND_BLOCK_BYTES[engine]
    return _native.Reader(pool, engine, depth=depth, block_bytes=block_bytes)


def _shards(plan: ReadPlan, manifest: Manifest) -> list[Shard]:
    by_name = {shard.name: shard for shard in manifest.shards}
    for name in plan.shards:
        if name not in by_name or not is_plain_name(name):
            raise InvalidRequest(f"the plan reads {shown(name)}, which is no shard of the checkpoint", "plan")
    return [by_name[name] for name in plan.shards]


def _check_verifiable(plan: ReadPlan, shards: Sequence[Shard]) -> None:
    for shard in shards:
        if len(shard.digests) != -(-shard.size_bytes // CHUNK_BYTES):
            raise InvalidRequest(f"{shown(shard.name)} cannot be verified: its digests are not known", "verify")
    for _, file, offset, size in plan.extents:
        if offset % CHUNK_BYTES or size < min(CHUNK_BYTES, shards[file].size_bytes - offset):
            raise InvalidRequest("a plan of less than whole chunks cannot be verified", "verify")

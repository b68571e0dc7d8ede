"""The node's pool: how large it is, and what is said of its pages once they are there."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stoker_checkpoint import _native
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.probe import probe_readers
from stoker_core.errors import InvalidMessage, InvalidSettings, StokerError, StorageFailed
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_storeagent.keep import PoolKeep, Taken
from stoker_storeagent.settings import StoreagentSettings
from stoker_storeagent.table import CONTENTS_FORMAT, PoolTable, ResidentRecord
from stoker_storeagent.threads import in_thread

log = get_logger("pool")

AVAILABLE_SHARE = 4
CHUNKS_MIN = 2
LOOK_S = 0.2
PROBE_CHUNKS = 4
PROBE_FILES = 24
"""So that each turn of a probe reads others."""
_CGROUP_FILES = (  # version 2, then 1: limit and use of the container that we are in
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class OpenPool:
    """A pool and its table, new or taken over.

    records: of what the agent before this one left in it; their chunks are allocated.  loading: instances that may read
    from them still.
    """

    pool: Pool
    table: PoolTable
    records: tuple[ResidentRecord, ...] = ()
    loading: tuple[str, ...] = ()

    def close(self) -> None:
        self.pool.close()
        self.table.close()


async def open_pool(settings: StoreagentSettings, keep: PoolKeep, *, timeout_s: float) -> OpenPool:
    """The pool that the worker keeps, if it is what settings ask for, else a new one, whose pages come in the background.

    timeout_s: for the worker to answer.
    Raises InvalidSettings if it would be too small, NativeUnavailable if the kernel refuses it, StorageFailed.
    """
    taken = await keep.take(timeout_s=timeout_s)
    if taken is not None:
        try:
            return await asyncio.to_thread(_adopted, settings, taken)
        except (InvalidMessage, StorageFailed) as error:
            log.warning("pool_not_adopted", code=error.code, error=error.message)
        finally:
            taken.close()
        await keep.drop()  # its memory is wanted for the new one
    return await asyncio.to_thread(_new, settings)


def _adopted(settings: StoreagentSettings, taken: Taken) -> OpenPool:
    """Raises InvalidMessage, StorageFailed."""
    table = PoolTable.adopt(taken.table_fd)
    try:
        snapshot = table.read()
        if snapshot is None or snapshot.format != CONTENTS_FORMAT:
            raise InvalidMessage("what lies in the pool is not known")
        if settings.pool_bytes and snapshot.pool_chunks != settings.pool_bytes // CHUNK_BYTES:
            raise InvalidMessage("STOKER_STOREAGENT_POOL_BYTES asks for another size")
        pool = Pool.adopt(
            taken.pool_fd,
            [chunk for record in snapshot.residents for chunk in record.chunks],
            lock=settings.pool_lock,
            fault_threads=settings.pool_fault_threads,
            reader=settings.reader,
            register_cuda=_pinned(settings),
        )
    except BaseException:
        table.close()
        raise
    return OpenPool(pool, table, snapshot.residents, taken.loading)


def _new(settings: StoreagentSettings) -> OpenPool:
    size_bytes = settings.pool_bytes or available_bytes() // AVAILABLE_SHARE
    if size_bytes < CHUNKS_MIN * CHUNK_BYTES:
        raise InvalidSettings(
            f"STOKER_STOREAGENT_POOL_BYTES: {size_bytes} bytes are too few; the pool needs {CHUNKS_MIN * CHUNK_BYTES}"
        )
    pool = Pool(
        size_bytes,
        huge=settings.pool_huge,
        lock=settings.pool_lock,
        fault_threads=settings.pool_fault_threads,
        reader=settings.reader,
        register_cuda=_pinned(settings),
    )
    try:
        return OpenPool(pool, PoolTable())
    except BaseException:
        pool.close()
        raise


def _pinned(settings: StoreagentSettings) -> bool:
    """Copies to a GPU are fast from memory that its driver has pinned. That takes a context on the first device."""
    return settings.ring_slots > 0 and bool(_native.cuda_available()[0])


def available_bytes() -> int:
    """Memory that can be taken without making others give theirs up: of the machine, or of our container if that has less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    for limit, used in _CGROUP_FILES:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        available = min(available, left + _reclaimable_bytes(Path(limit).with_name("memory.stat")))
    return max(available, 0)


def _reclaimable_bytes(stat: Path) -> int:
    """Page cache counts as use of a container; what was not used twice goes as soon as memory is wanted."""
    try:
        values = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 has both: the first with all that lies below, as its limit counts.
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def pool_part(pool: Pool, ssd_root: Path, *, probe: bool) -> Part:
    """Says in the log when the pool is warm, and what the kernel refused.

    probe: then measure which engine reads this disk faster, on a file below `ssd_root` if one is large enough.
    """

    async def run() -> None:
        await _warm(pool)
        if probe:
            await in_thread(partial(_probe, pool, ssd_root), threading.Event())
        await asyncio.Event().wait()

    return Part("pool", run)


async def _warm(pool: Pool) -> None:
    began_s = time.monotonic()
    status = pool.status()
    log.info("pool_open", bytes=status.total_bytes, reader=status.reader, reader_reason=status.reader_reason)
    while not await in_thread(partial(pool.wait_warm, LOOK_S), threading.Event()):
        if refused := pool.native.fault_errno:
            log.warning(
                "pool_not_warm", error=os.strerror(refused), hint="reads make the pages that are missing, slower"
            )
            break
    status = pool.status()
    pinned_bytes, not_pinned = _native.cuda_pinned()
    log.info(
        "pool_warm",
        bytes=status.warm_bytes,
        huge_bytes=status.huge_bytes,
        locked_bytes=status.locked_bytes,
        cuda_bytes=pinned_bytes,
        pages=status.pages,
        duration_ms=round((time.monotonic() - began_s) * 1000),
    )
    if status.lock_errno:
        log.warning("pool_not_locked", **_lock_refusal(status.lock_errno, status.total_bytes))
    if not_pinned:
        log.warning("pool_not_pinned", error=not_pinned, hint="copies to a GPU will be slower")
    if status.collapse_errno:
        log.warning(
            "pool_pages_small",
            error=os.strerror(status.collapse_errno),
            huge_bytes=status.huge_bytes,
            bytes=status.total_bytes,
            hint="first use of weights will be slower; reserve huge pages (vm.nr_hugepages) or allow shmem ones",
        )


def _probe(pool: Pool, ssd_root: Path) -> None:
    try:
        found = (file for file in (ssd_root / "chunks").glob("*/*") if file.stat().st_size == CHUNK_BYTES)
        paths = list(itertools.islice(found, PROBE_FILES))
        if len(paths) < PROBE_CHUNKS:
            return
        result = probe_readers(paths, chunks=PROBE_CHUNKS)
    except (OSError, StokerError) as error:
        log.warning("readers_not_probed", error=str(error))
        return
    pool.use(result)
    rates = {f"{engine}_bytes_per_s": round(rate) for engine, rate in result.bytes_per_s.items()}
    log.info("readers_probed", faster=result.faster, direct=result.direct, **rates)


def _lock_refusal(number: int, size_bytes: int) -> dict[str, str | int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = {limit: "unlimited" if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)}
    why: dict[str, str | int] = {"error": os.strerror(number), "rlimit_memlock": shown[soft]}
    if number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        why["hint"] = (
            f"the pool may be swapped out; raise RLIMIT_MEMLOCK (now {shown[soft]}, at most {shown[hard]} bytes) to "
            f"{size_bytes} (ulimit -l, LimitMEMLOCK=), grant CAP_IPC_LOCK, or set STOKER_STOREAGENT_POOL_LOCK=false"
        )
    return why

"""Which way checkpoints are loaded on this machine: tried out, not guessed."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

import msgspec

from stoker_core.errors import StokerError

PROBE_CHUNKS = 4
"""Of the file that is read: 64 MiB."""
POOL_CHUNKS = 2
WARM_S = 20.0
_WRITE_BYTES = 2**20


class LivePath(msgspec.Struct, frozen=True, kw_only=True):
    """What a load goes through.

    reader: the engine that is used, io_uring or threads.  gb_per_s: of those that work, reading one file below `directory`.
    missing: engine → why the kernel refuses it.  direct: whether reads there pass the page cache by (O_DIRECT).
    pages: what a pool lies on: hugetlb, collapsed (transparent huge pages) or small.  pages_refused, lock_refused: the
    kernel's words where it gave no huge or no locked pages.  memlock_bytes: the limit of locked memory; -1: none.
    hugetlb_free_bytes: reserved huge pages that nobody uses.  cuda_missing: why there is no CUDA; empty if there is.
    """

    directory: str
    reader: str
    gb_per_s: dict[str, float]
    missing: dict[str, str]
    direct: bool
    pages: str
    pages_refused: str
    lock_refused: str
    memlock_bytes: int
    hugetlb_free_bytes: int
    cuda_missing: str


def try_out(home: Path, problems: list[str]) -> LivePath | None:
    """Read a temporary file in `home`, or where it is going to be, and make a small pool. Takes about a second.

    What makes loading impossible goes to `problems`, and there is nothing to report then.
    """
    directory = next(path for path in (home, *home.absolute().parents) if path.is_dir())
    try:
        return _tried(directory)
    except ImportError as error:
        problems.append(f"the native loader cannot be used: {error}")
    except StokerError as error:
        problems.append(f"the native loader does not work: {error.message}")
    except OSError as error:
        problems.append(f"the native loader cannot be tried in {directory}: {error.strerror or error}")
    return None


def shown(found: LivePath) -> dict[str, str]:
    """For people: what is live, and why not the other."""
    rates = ", ".join(f"{engine} {rate:.1f} GB/s" for engine, rate in found.gb_per_s.items())
    missing = "".join(f"; no {engine}: {reason}" for engine, reason in found.missing.items())
    refused = f" (huge ones refused: {found.pages_refused})" if found.pages_refused else ""
    limit = "no limit" if found.memlock_bytes < 0 else f"limit {found.memlock_bytes / 2**20:.0f} MiB"
    return {
        "reader": f"{found.reader} ({rates}{missing})",
        "O_DIRECT": f"{'yes' if found.direct else 'no: through the page cache'} ({found.directory})",
        "pool's pages": f"{found.pages}{refused}; {found.hugetlb_free_bytes / 2**20:.0f} MiB of hugetlb free",
        "locked memory": f"refused: {found.lock_refused} ({limit})" if found.lock_refused else f"yes ({limit})",
        "CUDA": f"none: {found.cuda_missing}" if found.cuda_missing else "yes",
    }


def _tried(directory: Path) -> LivePath:
    from stoker_checkpoint import _native
    from stoker_checkpoint.plan import CHUNK_BYTES
    from stoker_checkpoint.pool import Pool
    from stoker_checkpoint.probe import probe_readers

    with tempfile.NamedTemporaryFile(dir=directory, prefix=".stoker-probe-") as file:
        block = os.urandom(_WRITE_BYTES)
        for _ in range(PROBE_CHUNKS * CHUNK_BYTES // _WRITE_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        readers = probe_readers([Path(file.name)], chunks=PROBE_CHUNKS)
    with Pool(POOL_CHUNKS * CHUNK_BYTES) as pool:
        pool.wait_warm(WARM_S)
        status = pool.status()
    usable, reason = _native.cuda_available()
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LivePath(
        directory=str(directory),
        reader=readers.faster,
        gb_per_s={engine: round(rate / 1e9, 2) for engine, rate in readers.bytes_per_s.items()},
        missing=dict(readers.missing.items()),
        direct=readers.direct,
        pages=status.pages,
        pages_refused=os.strerror(status.collapse_errno) if status.collapse_errno else "",
        lock_refused=os.strerror(status.lock_errno) if status.lock_errno else "",
        memlock_bytes=-1 if memlock == resource.RLIM_INFINITY else memlock,
        hugetlb_free_bytes=_hugetlb_free_bytes(),
        cuda_missing="" if usable else reason,
    )


def _hugetlb_free_bytes() -> int:
    """Source: Documentation/admin-guide/mm/hugetlbpage.rst of the kernel."""
    free = 0
    for size in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"):
        free += int((size / "free_hugepages").read_text()) * int(size.name.split("-")[1][:-2]) * 1024
    return free

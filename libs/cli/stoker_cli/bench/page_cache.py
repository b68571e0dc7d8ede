"""The page cache's share of files: dropped before a cold measurement, and looked at, so that none is cold in name only."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_MAP_FAILED = ctypes.c_void_p(-1).value


def drop(files: Sequence[Path]) -> None:
    """Write back and forget the pages of `files`; the whole page cache where that is permitted."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def cached_bytes(files: Sequence[Path]) -> int:
    """Bytes of `files` that lie in the page cache. Source: mincore(2); of files that are not ours it says all do."""
    return sum(_cached_pages(file) for file in files) * mmap.PAGESIZE


def _cached_pages(file: Path) -> int:
    size = file.stat().st_size
    if size == 0:
        return 0
    resident = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    fd = os.open(file, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap", str(file))
    try:
        if _libc.mincore(address, size, resident) != 0:
            raise OSError(ctypes.get_errno(), "mincore", str(file))
    finally:
        _libc.munmap(address, size)
    return resident.raw.count(b"\x01")

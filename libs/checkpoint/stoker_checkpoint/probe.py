"""Which engine reads a disk faster. Measured, because it depends on disk, kernel and sandbox."""

from __future__ import annotations

import errno
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stoker_checkpoint import _native
from stoker_checkpoint.plan import CHUNK_BYTES, aligned
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.readers import Engine, make_reader
from stoker_core.errors import NativeUnavailable, ReadFailed

ENGINES: tuple[Engine, ...] = ("io_uring", "threads")
ROUNDS = 3
CHUNKS = 8
"""Of the file, read per engine and round: 128 MiB take a moment on a slow disk, and tell on a fast one."""
_TIMEOUT_S = 60.0

_Piece = tuple[Path, int, int]
"""A chunk: file, size of the file, offset."""


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """bytes_per_s: medians of those that work.  missing: engine → why the kernel refuses it.

    direct: whether the file system takes O_DIRECT; if not, the page cache was measured.
    """

    faster: Engine
    bytes_per_s: dict[Engine, float]
    missing: dict[Engine, str]
    direct: bool


def probe_readers(paths: Sequence[Path], *, rounds: int = ROUNDS, chunks: int = CHUNKS) -> ProbeResult:
    """Read files with both engines in turns, each turn other chunks of them as far as there are enough.

    Blocks, and takes memory for `chunks` chunks. Raises ReadFailed; NativeUnavailable if it cannot have the memory.
    """
    pieces = [piece for path in paths for piece in _pieces(path)]
    if not pieces:
        raise ReadFailed(str(paths[0]) if paths else "no file", 0, errno.ENODATA)
    chunks = min(chunks, len(pieces))
    with Pool(chunks * CHUNK_BYTES, huge="none", lock=False) as pool, ExitStack() as stack:
        pool.wait_warm(_TIMEOUT_S)
        readers: dict[Engine, _native.Reader] = {}
        missing: dict[Engine, str] = {}
        for engine in ENGINES:
            try:
                readers[engine] = make_reader(pool.native, engine)
                stack.callback(readers[engine].close)
            except OSError as error:
                missing[engine] = error.strerror or str(error)
        if not readers:
            raise NativeUnavailable(f"no engine can be had: {missing}")
        rates: dict[Engine, list[float]] = {engine: [] for engine in readers}
        direct, first = True, 0
        for number in range(rounds):
            for engine in list(readers)[:: -1 if number % 2 else 1]:
                rate, past_cache = _timed(readers[engine], [pieces[(first + i) % len(pieces)] for i in range(chunks)])
                rates[engine].append(rate)
                direct = direct and past_cache
                first += chunks
    medians = {engine: statistics.median(of) for engine, of in rates.items()}
    return ProbeResult(
        faster=max(medians, key=lambda engine: medians[engine]), bytes_per_s=medians, missing=missing, direct=direct
    )


def _pieces(path: Path) -> list[_Piece]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ReadFailed(str(path), 0, error.errno or 0) from error
    return [(path, size, offset) for offset in range(0, size, CHUNK_BYTES)]


def _timed(reader: _native.Reader, pieces: Sequence[_Piece]) -> tuple[float, bool]:
    """Bytes per second of these chunks; whether by O_DIRECT."""
    files = {path: (index, size) for index, (path, size) in enumerate(dict.fromkeys((p, s) for p, s, _ in pieces))}
    extents = [
        (position, files[path][0], offset, min(CHUNK_BYTES, aligned(size) - offset))
        for position, (path, size, offset) in enumerate(pieces)
    ]
    began_s = time.perf_counter()
    load = reader.start([(str(path), size, -1) for path, (_, size) in files.items()], extents, range(len(pieces)))
    path, _, first = pieces[0]
    if not load.join(_TIMEOUT_S):
        raise ReadFailed(str(path), first, errno.ETIMEDOUT)
    took_s = time.perf_counter() - began_s
    if load.board.state != _native.DONE:
        _, file, offset, error = load.board.failure()
        raise ReadFailed(str(list(files)[file]), offset, error)
    return load.read_bytes / took_s, load.direct

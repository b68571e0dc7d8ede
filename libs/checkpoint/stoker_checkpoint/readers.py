"""By which engine a pool is read into: the choice, and the readers themselves."""

from __future__ import annotations

import os
from typing import Literal

from stoker_checkpoint import _native
from stoker_core.errors import NativeUnavailable

Engine = Literal["io_uring", "threads"]
Asked = Literal["auto"] | Engine
"""auto: io_uring where the kernel gives it, else threads, until `Readers.use` says otherwise."""

DEPTH_AND_BLOCK_BYTES: dict[str, tuple[int, int]] = {"io_uring": (32, 4 * 2**20), "threads": (4, 16 * 2**20)}
"""Reads in flight and bytes of each. Measured on a virtual NVMe disk, GB/s: io_uring 8 × 4 MiB 2.6, 16 × 4 2.9, 32 × 4 2.9;
threads 4 × 8 MiB 2.75, 4 × 16 2.9. Twice as much gains nothing."""


def make_reader(pool: _native.Pool, engine: Engine) -> _native.Reader:
    """Raises OSError if the kernel refuses the engine."""
    depth, block_bytes = DEPTH_AND_BLOCK_BYTES[engine]
    return _native.Reader(pool, engine, depth=depth, block_bytes=block_bytes)


class Readers:
    """Of one pool, each made when it is first needed. Changed by one thread at a time."""

    def __init__(self, pool: _native.Pool, asked: Asked) -> None:
        self._pool, self._asked = pool, asked
        self._faster: Engine = "io_uring"
        self._made: dict[Engine, _native.Reader] = {}
        refused = _native.io_uring_errno()
        self._uring_reason = os.strerror(refused) if refused else ""

    def use(self, engine: Engine) -> None:
        """From now on, unless one was asked for by name."""
        self._faster = engine

    @property
    def engine(self) -> Engine:
        """Of the next load."""
        if self._asked != "auto":
            return self._asked
        return "threads" if self._uring_reason else self._faster

    @property
    def reason(self) -> str:
        """Why it is not io_uring; empty if it is, or by choice."""
        return self._uring_reason if self.engine == "threads" else ""

    @property
    def registered_buffers(self) -> bool | None:
        """None: nothing was read yet."""
        reader = self._made.get(self.engine)
        return reader.registered_buffers if reader else None

    def current(self) -> _native.Reader:
        """Raises NativeUnavailable if it cannot be had."""
        engine = self.engine
        if engine not in self._made:
            try:
                self._made[engine] = make_reader(self._pool, engine)
            except OSError as error:
                if self._asked != "auto" or engine == "threads":
                    raise NativeUnavailable(f"the reader {engine} cannot be had: {error}") from error
                self._uring_reason = error.strerror or str(error)
                return self.current()
        return self._made[engine]

    def close(self) -> None:
        for reader in self._made.values():
            reader.close()

"""A load that a pool reads from a checkpoint's shards."""

from __future__ import annotations

from stoker_checkpoint import _native
from stoker_checkpoint.pool_load import PoolLoad


class Reading(PoolLoad):
    """Made by `Pool.read`. What cannot be read, or is wrong, ends it."""

    def progress(self) -> tuple[int, int]:
        """Bytes read, of how many."""
        return min(self._load.read_bytes, self._plan.read_bytes), self._plan.read_bytes

    @staticmethod
    def _mismatch(load: _native.Load, position: int, file: int, offset: int) -> None:
        load.fail(_native.MISMATCH, file, offset, 0)

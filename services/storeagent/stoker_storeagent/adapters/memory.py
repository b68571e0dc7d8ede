"""The node's pool behind its port."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stoker_checkpoint.filling import Filling
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_core.errors import NativeUnavailable, StorageFailed
from stoker_storeagent.records import Checkpoint


class PoolMemory:
    """Implements ports.Memory."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def chunks_total(self) -> int:
        return self._pool.status().total_bytes // CHUNK_BYTES

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
        digests = [files[position][1] if position in files else "" for position in range(checkpoint.positions)]
        try:
            return self._pool.fill(
                checkpoint.plan,
                checkpoint.with_digests(checkpoint.by_shard(digests)).manifest,
                {position: path for position, (path, _) in files.items()},
                directory=folder,
                window_chunks=window_chunks,
                chunks=chunks,
                priority=priority,
            )
        except (
            OSError,
            NativeUnavailable,
        ) as error:  # no descriptor, thread or memory left: this lease's failure alone
            raise StorageFailed(str(folder), str(error)) from error

    def free(self, chunks: Sequence[int]) -> None:
        self._pool.native.free(chunks)

"""A load whose positions come from files of single chunks, and from its owner's hands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stoker_checkpoint import _native
from stoker_checkpoint.digests import require_digests
from stoker_checkpoint.header import Shard
from stoker_checkpoint.plan import ReadPlan, aligned
from stoker_checkpoint.pool_load import PoolLoad, failure_error, place_of
from stoker_core.errors import InvalidRequest, StokerError

if TYPE_CHECKING:
    from stoker_checkpoint.pool import Pool


class Filling(PoolLoad):
    """Made by `Pool.fill`. No file ends it: what one cannot give becomes the owner's, who learns of it by `next_failed`.

    The owner writes a position's bytes to its `buffer`, once `window_open` says that he may, and publishes it. He must
    have stopped writing before he closes the load.
    """

    def __init__(
        self,
        pool: Pool,
        load: _native.Load,
        chunks: Sequence[int],
        plan: ReadPlan,
        shards: Sequence[Shard],
        directory: Path,
        files: Mapping[int, Path],
    ) -> None:
        super().__init__(pool, load, chunks, plan, shards, directory)
        self._files = dict(files)
        self._owned = set(range(len(plan.positions))) - self._files.keys()

    def buffer(self, position: int) -> memoryview:
        """The position's bytes in the pool, writable; of exactly the position's size."""
        _, _, size = place_of(self._plan, self._shards, position)
        return self._pool.chunk(self._table[position])[:size]

    def window_open(self, position: int) -> bool:
        """Whether the position's chunk may be written to: always, unless it streams through a window."""
        return self._load.window_open(position)

    def is_ready(self, position: int) -> bool:
        return self._board.is_ready(position)

    async def ready(self, position: int) -> bool:
        """Until the position is ready (True), or the load ended without it (False)."""
        while True:
            ended = self._board.state != _native.LOADING
            if self._board.is_ready(position):
                return True
            if ended:
                return False
            await self._changed()

    async def next_failed(self) -> tuple[int, StokerError] | None:
        """A position of a file that cannot be read or has another digest: it is the owner's from now on.

        ReadFailed, CheckpointChanged or CorruptCheckpoint name the chunk's file. None once every position of a file was
        published or given back so, and when the load has ended.
        """
        while True:
            left = self._load.unsettled
            failed = self._load.next_failed()
            if failed is not None:
                position, kind, _, offset, error = failed
                self._owned.add(position)
                return position, failure_error(kind, str(self._files[position]), offset, error)
            if not left:
                return None
            await self._changed()

    def publish(self, position: int) -> None:
        """What the owner wrote is right, and final. Nothing happens if the load has ended.

        Raises ValueError for a position that is not the owner's, was published, or whose window is not open.
        """
        if position not in self._owned:
            raise ValueError(f"position {position} is not the owner's to publish")
        self._load.publish(position)

    def release(self, position: int) -> None:
        """For an owner who is his own consumer: done with all positions below this one."""
        self._board.release(position)

    def fail(self, position: int) -> None:
        """End the load: what belongs at this position cannot be had."""
        file, offset, _ = place_of(self._plan, self._shards, position)
        self._load.fail(_native.SOURCE, file, offset, 0)

    @staticmethod
    def _mismatch(load: _native.Load, position: int, file: int, offset: int) -> None:
        load.reject(position, _native.MISMATCH, file, 0)  # of the chunk's own file it is the beginning


NativeFile = tuple[str, int, int]
Extent = tuple[int, int, int, int]


def chunk_files(
    plan: ReadPlan, shards: Sequence[Shard], files: Mapping[int, Path]
) -> tuple[list[NativeFile], list[Extent]]:
    """Files and extents for the reader, of positions that are read each from a file of its own.

    Raises InvalidRequest for no position of the plan, and for one whose digest is not known.
    """
    sources: list[NativeFile] = []
    extents: list[Extent] = []
    for position in sorted(files):
        if not 0 <= position < len(plan.positions):
            raise InvalidRequest(f"the plan has no position {position}", "files")
        file, _, size = place_of(plan, shards, position)
        require_digests(shards[file], "files")
        extents.append((position, len(sources), 0, aligned(size)))
        sources.append((str(files[position]), size, -1))
    return sources, extents

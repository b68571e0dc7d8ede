"""The models that this node knows: what the catalogue said of them, kept on the disk so that the database may be away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from stoker_core.errors import CorruptCheckpoint, DatabaseUnavailable, StokerError
from stoker_core.logging import get_logger
from stoker_storeagent.ports import Catalogue, Disk
from stoker_storeagent.records import Checkpoint

log = get_logger("known")


class Known:
    """Digests of a model's chunks are bound by whoever has all of them first, in the catalogue, and then here."""

    def __init__(self, catalogue: Catalogue, disk: Disk) -> None:
        self._catalogue, self._disk = catalogue, disk
        self._checkpoints: dict[str, Checkpoint] = {}
        self._finding: dict[str, asyncio.Task[Checkpoint]] = {}
        self._to_bind: dict[str, dict[str, tuple[str, ...]]] = {}
        self._keeping = asyncio.Lock()

    def adopt(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._checkpoints.update({checkpoint.model_id: checkpoint for checkpoint in checkpoints})

    @property
    def ids(self) -> set[str]:
        return set(self._checkpoints)

    def get(self, model_id: str) -> Checkpoint | None:
        return self._checkpoints.get(model_id)

    async def find(self, model_id: str) -> Checkpoint:
        """Its folder is on the disk by then. All who ask at once share one look-up.

        Raises ModelNotFound, RefusedCheckpoint, StorageFailed, DatabaseUnavailable.
        """
        known = self._checkpoints.get(model_id)
        if known is not None and known.bound:
            return known
        finding = self._finding.get(model_id)
        if finding is None:
            finding = self._finding[model_id] = asyncio.create_task(self._find(model_id), name=f"find {model_id}")
            finding.add_done_callback(lambda found: self._found(model_id, found))
        try:
            return await asyncio.shield(finding)
        except DatabaseUnavailable:
            if known is None:
                raise
            return known  # all it lacks are digests, which may be unknown to everybody

    async def bind(self, checkpoint: Checkpoint, digests: Sequence[str]) -> Checkpoint:
        """All chunks have arrived, with these digests by position. Returns what is known of the model from now on.

        While the database is away they are bound later: see `bind_waiting`.
        Raises CorruptCheckpoint if the model has other bytes elsewhere, StorageFailed.
        """
        by_shard = checkpoint.by_shard(digests)
        self._to_bind[checkpoint.model_id] = by_shard
        try:
            await self._bind(checkpoint.model_id, by_shard)
        except DatabaseUnavailable as error:
            log.warning("digests_not_bound", model_id=checkpoint.model_id, error=error.message)
            return checkpoint
        return self._checkpoints.get(checkpoint.model_id, checkpoint)

    async def bind_waiting(self) -> list[str]:
        """Bind what could not be before. Returns the models that have other bytes elsewhere. Raises DatabaseUnavailable."""
        refused = []
        for model_id, by_shard in list(self._to_bind.items()):
            try:
                await self._bind(model_id, by_shard)
            except CorruptCheckpoint as error:
                log.warning("digests_refused", model_id=model_id, error=error.message)
                refused.append(model_id)
            except StokerError:
                if not refused:
                    raise
                break  # what was refused is to be told now; the others wait on
        return refused

    def forget(self, model_id: str) -> None:
        self._checkpoints.pop(model_id, None)
        self._to_bind.pop(model_id, None)

    def _found(self, model_id: str, finding: asyncio.Task[Checkpoint]) -> None:
        del self._finding[model_id]
        if not finding.cancelled():
            finding.exception()  # seen, also if all who waited have left

    async def _find(self, model_id: str) -> Checkpoint:
        checkpoint, files = await self._catalogue.find(model_id)
        return await self._keep(checkpoint, files)

    async def _keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> Checkpoint:
        """Returns what is known of the model from now on: once it is bound it stays so, whatever was looked up before."""
        async with self._keeping:
            known = self._checkpoints.get(checkpoint.model_id)
            if known is not None and known.bound and not checkpoint.bound:
                return known
            await self._disk.keep(checkpoint, files)
            self._checkpoints[checkpoint.model_id] = checkpoint
            return checkpoint

    async def _bind(self, model_id: str, by_shard: Mapping[str, Sequence[str]]) -> None:
        try:
            await self._catalogue.bind(model_id, by_shard)
        except CorruptCheckpoint:
            self._to_bind.pop(model_id, None)
            raise
        self._to_bind.pop(model_id, None)
        known = self._checkpoints.get(model_id)
        if known is not None:
            await self._keep(known.with_digests(by_shard), None)

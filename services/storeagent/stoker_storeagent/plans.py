"""What is known of the tier's checkpoints: headers are parsed and reads planned once per copy."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import msgspec

from stoker_checkpoint.manifest import Manifest, Shard
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import ReadPlan, plan_reads
from stoker_core.errors import CheckpointChanged
from stoker_storeagent.adapters.ssd import SsdDirectory, StoredFile

PLANS_MAX = 64


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A copy on the SSD, with times and digests as of when it was written.

    name: the model's.  verified: digests are known, so that what is read can be held against them.
    """

    name: str
    manifest: Manifest
    plan: ReadPlan
    verified: bool


class Plans:
    """The most recently used PLANS_MAX are kept."""

    def __init__(self, ssd: SsdDirectory) -> None:
        self._ssd = ssd
        self._known: OrderedDict[str, asyncio.Future[Checkpoint]] = OrderedDict()

    async def of(self, model_id: str) -> Checkpoint:
        """Of a model whose copy is pinned. All who ask at once share one parse.

        Raises CorruptCheckpoint and its parent RefusedCheckpoint if the copy is not what was written.
        """
        known = self._known.get(model_id)
        if known is None:
            known = self._known[model_id] = asyncio.ensure_future(asyncio.to_thread(self._read, model_id))
            known.add_done_callback(lambda parsed: self._parsed(model_id, parsed))
            if len(self._known) > PLANS_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(model_id)
        return await asyncio.shield(known)

    def forget(self, model_id: str) -> None:
        """Its copy is gone; another one has other times."""
        self._known.pop(model_id, None)

    def _parsed(self, model_id: str, parsed: asyncio.Future[Checkpoint]) -> None:
        failed = parsed.cancelled() or parsed.exception() is not None
        if failed and self._known.get(model_id) is parsed:
            self.forget(model_id)

    def _read(self, model_id: str) -> Checkpoint:
        stored = self._ssd.stored(model_id)
        path = self._ssd.path(model_id)
        files = {file.path: file for file in stored.files}
        manifest = open_checkpoint(path)
        shards = tuple(_as_stored(str(path / shard.name), shard, files.get(shard.name)) for shard in manifest.shards)
        manifest = msgspec.structs.replace(manifest, shards=shards)
        return Checkpoint(
            name=stored.name,
            manifest=manifest,
            plan=plan_reads(manifest),
            verified=all(shard.digests for shard in shards),
        )


def _as_stored(path: str, shard: Shard, file: StoredFile | None) -> Shard:
    """The shard with what was known of its file when it was written, so that later changes show."""
    if file is None:
        raise CheckpointChanged(path, "it was not there when the model was copied")
    if shard.size_bytes != file.size_bytes:
        raise CheckpointChanged(path, f"it has {shard.size_bytes} bytes, not {file.size_bytes}")
    if file.mtime_ns == -1:
        return shard
    return msgspec.structs.replace(shard, mtime_ns=file.mtime_ns, digests=file.chunk_digests)

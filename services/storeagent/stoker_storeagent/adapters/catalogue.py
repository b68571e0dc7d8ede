"""The catalogue of models on the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stoker_checkpoint.leased import decode_manifest
from stoker_checkpoint.manifest import Manifest
from stoker_core.errors import CheckpointChanged, ModelNotFound
from stoker_db.ports import Database, ModelFile
from stoker_storeagent.ports import Inspected
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.sources import Sources


class DatabaseCatalogue:
    """Implements ports.Catalogue. sources: asked for models that an earlier version registered, which kept no manifests."""

    def __init__(self, database: Database, sources: Sources) -> None:
        self._models, self._sources = database.models, sources

    async def find(self, model_id: str) -> tuple[Checkpoint, Mapping[str, bytes]]:
        """Also raises SourceDenied and SourceUnavailable, for those models."""
        spec = next((spec for spec in await self._models.all() if spec.model_id == model_id), None)
        files = await self._models.files(model_id, with_content=True)
        if spec is None or not files:
            raise ModelNotFound(model_id)
        small = {file.path: file.content for file in files if file.content is not None}
        weights = {file.path: file for file in files if file.content is None}
        versions = {file.path: file.version for file in weights.values() if file.version}
        if encoded := await self._models.manifest(model_id):
            manifest = decode_manifest(encoded, spec.source)
        else:
            found = await self._sources.inspect(spec.source)
            manifest, versions = _still_registered(found, weights), found.versions
        checkpoint = Checkpoint(
            model_id=model_id,
            name=spec.name,
            source=spec.source,
            manifest=manifest,
            versions=versions,
            small_bytes=sum(map(len, small.values())),
        )
        if all(file.chunk_digests for file in weights.values()):
            checkpoint = checkpoint.with_digests({path: file.chunk_digests for path, file in weights.items()})
        return checkpoint, small

    async def bind(self, model_id: str, digests: Mapping[str, Sequence[str]]) -> None:
        await self._models.bind_chunks(model_id, {path: tuple(chunks) for path, chunks in digests.items()})


def _still_registered(found: Inspected, weights: Mapping[str, ModelFile]) -> Manifest:
    """Raises CheckpointChanged if the source has other shards by now."""
    sizes = {shard.name: shard.size_bytes for shard in found.manifest.shards}
    if sizes != {path: file.size_bytes for path, file in weights.items()}:
        raise CheckpointChanged(found.source, "its shards are not those that were registered; register it anew")
    return found.manifest

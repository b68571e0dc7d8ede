"""Registering a model: wholly or not at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import msgspec

from stoker_checkpoint.leased import decode_manifest, encode_manifest
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.model_config import model_spec
from stoker_contracts.control import Registered, RegisterModel
from stoker_contracts.events import MODEL_REGISTERED
from stoker_contracts.models import ModelSpec
from stoker_core.errors import InvalidModelName, ModelExists, ModelNotFound
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_db.ports import ModelFile, Models
from stoker_storeagent.ports import Events, Inspected
from stoker_storeagent.sources import Sources

log = get_logger("register")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Registrar:
    """Answers each order with a registration that is whole, or with the reason why there is none."""

    def __init__(self, models: Models, sources: Sources, events: Events, ids: Ids) -> None:
        self._models, self._sources, self._events, self._ids = models, sources, events, ids

    async def register(self, order: RegisterModel) -> Registered:
        """Repeats are answered with the registration that exists.

        Raises InvalidModelName, RefusedCheckpoint, InvalidRequest, ModelExists, SourceDenied, SourceUnavailable,
        DatabaseUnavailable.
        """
        if not _NAME.fullmatch(order.name):
            raise InvalidModelName(order.name[:200])
        found = await self._sources.inspect(order.source)
        spec = model_spec(order.name, self._ids.new("model"), found.source, found.config, found.manifest, order.options)
        files = model_files(found)
        existing = await self._existing(spec, files, found.manifest)
        if existing is None:
            try:
                await self._models.add(spec, files, encode_manifest(found.manifest))
            except ModelExists:  # somebody was faster; with the same contents that is no failure
                existing = await self._existing(spec, files, found.manifest)
        total_bytes = sum(file.size_bytes for file in files)
        if existing is None:
            log.info("registered", model=spec.name, model_id=spec.model_id, files=len(files), bytes=total_bytes)
            self._events.emit(
                MODEL_REGISTERED,
                spec.model_id,
                model=spec.name,
                architecture=spec.architecture,
                dtype=spec.dtype,
                bytes=total_bytes,
                source=spec.source,
            )
        return Registered(model=existing or spec, created=existing is None, files=len(files), total_bytes=total_bytes)

    async def _existing(self, spec: ModelSpec, files: Sequence[ModelFile], manifest: Manifest) -> ModelSpec | None:
        """The registration of this name, if it says the same. Raises ModelExists if it says something else."""
        try:
            known = await self._models.get(spec.name)
        except ModelNotFound:
            return None
        known_files = {file.path: file for file in await self._models.files(known.model_id, with_content=False)}
        known_manifest = await self._models.manifest(known.model_id)
        same = msgspec.structs.replace(spec, model_id=known.model_id) == known and len(files) == len(known_files)
        # Headers of the same size may still say something else. Earlier versions kept none.
        same = same and (not known_manifest or decode_manifest(known_manifest, spec.source) == manifest)
        if not same or not all(_agrees(file, known_files.get(file.path)) for file in files):
            raise ModelExists(spec.name)
        return known


def model_files(found: Inspected) -> list[ModelFile]:
    """Small files with contents and digests; weights by size and version, until their arrival tells their digests."""
    small = [
        ModelFile(path=name, size_bytes=len(content), digest=_digest(content), content=content)
        for name, content in found.small_files.items()
    ]
    return small + [
        ModelFile(path=shard.name, size_bytes=shard.size_bytes, version=found.versions.get(shard.name, ""))
        for shard in found.manifest.shards
    ]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _agrees(new: ModelFile, known: ModelFile | None) -> bool:
    """Whether a file is the one that is known: by what is known of both, as earlier versions kept less."""
    if known is None or new.size_bytes != known.size_bytes:
        return False
    pairs = ((new.digest, known.digest), (new.version, known.version))
    return all(mine == theirs for mine, theirs in pairs if mine and theirs)

"""Registering a model directory: wholly or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence

import msgspec

from stoker_checkpoint.directory import CheckpointDirectory, inspect_directory
from stoker_checkpoint.model_config import model_spec
from stoker_contracts.control import Registered, RegisterModel
from stoker_contracts.events import MODEL_REGISTERED
from stoker_contracts.models import ModelSpec
from stoker_core.errors import InvalidModelName, ModelExists, ModelNotFound
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_db.ports import ModelFile, Models
from stoker_storeagent.ports import Events
from stoker_storeagent.sources import Sources

log = get_logger("register")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Registrar:
    """Answers each order with a registration that is whole, or with the reason why there is none."""

    def __init__(self, models: Models, sources: Sources, events: Events, ids: Ids) -> None:
        self._models, self._sources, self._events, self._ids = models, sources, events, ids

    async def register(self, order: RegisterModel) -> Registered:
        """Repeats are answered with the registration that exists.

        Raises InvalidModelName, RefusedCheckpoint, InvalidRequest, ModelExists, DatabaseUnavailable.
        """
        if not _NAME.fullmatch(order.name):
            raise InvalidModelName(order.name[:200])
        directory = await asyncio.to_thread(self._inspect, order.source)
        source = directory.root.as_uri()
        spec = model_spec(order.name, self._ids.new("model"), source, directory, order.options)
        files = model_files(directory)
        existing = await self._existing(spec, files)
        if existing is None:
            try:
                await self._models.add(spec, files)
            except ModelExists:  # somebody was faster; with the same contents that is no failure
                existing = await self._existing(spec, files)
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
                source=source,
            )
        return Registered(model=existing or spec, created=existing is None, files=len(files), total_bytes=total_bytes)

    def _inspect(self, source: str) -> CheckpointDirectory:
        return inspect_directory(self._sources.directory(source))

    async def _existing(self, spec: ModelSpec, files: Sequence[ModelFile]) -> ModelSpec | None:
        """The registration of this name, if it says the same. Raises ModelExists if it says something else."""
        try:
            known = await self._models.get(spec.name)
        except ModelNotFound:
            return None
        known_files = {file.path: file for file in await self._models.files(known.model_id, with_content=False)}
        same = msgspec.structs.replace(spec, model_id=known.model_id) == known and len(files) == len(known_files)
        if not same or not all(_agrees(file, known_files.get(file.path)) for file in files):
            raise ModelExists(spec.name)
        return known


def model_files(directory: CheckpointDirectory) -> list[ModelFile]:
    """Small files with contents and digests; weights by size, until their first arrival tells their digests."""
    small = [
        ModelFile(path=file.name, size_bytes=len(file.content), digest=_digest(file.content), content=file.content)
        for file in directory.small_files
    ]
    return small + [ModelFile(path=shard.name, size_bytes=shard.size_bytes) for shard in directory.manifest.shards]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _agrees(new: ModelFile, known: ModelFile | None) -> bool:
    if known is None or new.size_bytes != known.size_bytes:
        return False
    return not new.digest or new.digest == known.digest

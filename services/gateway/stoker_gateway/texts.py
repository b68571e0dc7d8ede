"""The tokenizers at hand: built in a thread from the small files that Postgres holds, the least used one dropped."""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Protocol

from stoker_contracts.models import ModelSpec
from stoker_core.errors import StokerError, TokenizerFailed
from stoker_core.logging import get_logger
from stoker_db.ports import ModelFile, Models
from stoker_gateway.text.model_text import ModelText, import_library, load

log = get_logger("texts")


class Texts(Protocol):
    async def get(self, spec: ModelSpec) -> ModelText:
        """The tokenizer of a model. Raises TokenizerFailed, DatabaseUnavailable."""
        ...


class TokenizerCache:
    """Keeps at most `models_max` tokenizers; builds each once, however many requests wait for it."""

    def __init__(self, models: Models, directory: Path, *, models_max: int) -> None:
        self._models = models
        self._directory = directory
        self._models_max = models_max
        self._ready: OrderedDict[str, ModelText] = OrderedDict()
        self._building: dict[str, asyncio.Future[ModelText]] = {}
        # One thread: building holds the interpreter most of the time, and must not keep prompts from being encoded.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer-build")

    async def start(self) -> None:
        """Drop what an earlier run left, and import the library in the background."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, _empty, self._directory)
        self._thread.submit(import_library)

    async def get(self, spec: ModelSpec) -> ModelText:
        if text := self._ready.get(spec.model_id):
            self._ready.move_to_end(spec.model_id)
            return text
        if (building := self._building.get(spec.model_id)) is None:
            building = asyncio.ensure_future(self._build(spec))
            self._building[spec.model_id] = building
            building.add_done_callback(lambda done: self._built(spec, done))
        # Shielded: a client that goes away must not fail the others that wait for the same tokenizer.
        return await asyncio.shield(building)

    async def preload(self, specs: list[ModelSpec]) -> None:
        """Build ahead of the first request, as long as nothing must be dropped for it."""
        for spec in specs:
            if len(self._ready) + len(self._building) >= self._models_max:
                return
            try:
                await self.get(spec)
            except StokerError as error:
                log.warning("tokenizer_preload_failed", model=spec.name, code=error.code, error=error.message)

    def drop(self, model_id: str) -> None:
        """Forget a deleted model's tokenizer."""
        if self._ready.pop(model_id, None) is not None:
            self._thread.submit(shutil.rmtree, self._directory / model_id, ignore_errors=True)

    def close(self) -> None:
        for building in self._building.values():
            building.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _build(self, spec: ModelSpec) -> ModelText:
        files = await self._models.files(spec.model_id, with_content=True)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _materialise, spec.name, self._directory / spec.model_id, files)

    def _built(self, spec: ModelSpec, done: asyncio.Future[ModelText]) -> None:
        del self._building[spec.model_id]
        if done.cancelled() or done.exception() is not None:
            return
        self._ready[spec.model_id] = done.result()
        while len(self._ready) > self._models_max:
            self.drop(next(iter(self._ready)))


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _materialise(name: str, directory: Path, files: list[ModelFile]) -> ModelText:
    small = [file for file in files if file.content is not None]
    if not small:
        raise TokenizerFailed(name, "no tokenizer files were registered")
    for file in small:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise TokenizerFailed(name, f"{file.path!r} leaves the model's directory")
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content or b"")
    return load(name, directory)

"""Copying one model from its source directory to a temporary directory of the tier, several files at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from stoker_checkpoint.directory import inspect_directory
from stoker_contracts.models import ModelSpec
from stoker_core.errors import StokerError
from stoker_db.ports import ModelFile
from stoker_storeagent.adapters.ssd import SsdDirectory, StoredFile, StoredModel
from stoker_storeagent.sources import Sources
from stoker_storeagent.threads import in_thread


class Filler:
    """copies_at_once bounds the files that are copied at once, of all models together."""

    def __init__(self, ssd: SsdDirectory, sources: Sources, *, copies_at_once: int, chunk_bytes: int) -> None:
        self._ssd, self._sources = ssd, sources
        self._slots = asyncio.Semaphore(copies_at_once)
        self._chunk_bytes = chunk_bytes

    async def copy(
        self,
        spec: ModelSpec,
        files: Sequence[ModelFile],
        target: Path,
        on_bytes: Callable[[str, int], None],
    ) -> StoredModel:
        """Copy all files into `target` and check that they are a checkpoint still.

        on_bytes: (file, its bytes done so far), called from threads.
        Raises as Sources.directory, SsdDirectory.copy and inspect_directory do; when it has raised, no thread works on `target` any more.
        """
        cancelled = threading.Event()
        # Asked again: the model may have been registered through another node, which allows more.
        source = await in_thread(partial(self._sources.directory, spec.source), cancelled)
        try:
            async with asyncio.TaskGroup() as group:
                copies = [group.create_task(self._copy(source, file, target, cancelled, on_bytes)) for file in files]
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures
        stored = StoredModel(model_id=spec.model_id, name=spec.name, files=tuple(copy.result() for copy in copies))
        # A source that changed under the copy may have the right sizes and still be no checkpoint.
        await in_thread(partial(inspect_directory, target), cancelled)
        return stored

    async def _copy(
        self,
        source: Path,
        file: ModelFile,
        target: Path,
        cancelled: threading.Event,
        on_bytes: Callable[[str, int], None],
    ) -> StoredFile:
        copy = partial(
            self._ssd.copy,
            source,
            target,
            file,
            chunk_bytes=self._chunk_bytes,
            cancelled=cancelled,
            on_bytes=partial(on_bytes, file.path),
        )
        async with self._slots:
            return await in_thread(copy, cancelled)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that made the others: what a sibling raised on being stopped comes after it."""
    leaves = [
        leaf
        for failure in failures.exceptions
        for leaf in (failure.exceptions if isinstance(failure, BaseExceptionGroup) else (failure,))
    ]
    return next((leaf for leaf in leaves if isinstance(leaf, StokerError)), leaves[0])

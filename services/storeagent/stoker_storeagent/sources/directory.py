"""Models in directories of this node, under the roots that its operator allows."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from stoker_checkpoint.directory import inspect_directory, resolve_inside, unreadable
from stoker_checkpoint.manifest import Manifest
from stoker_core.errors import CheckpointChanged, RefusedCheckpoint, SourceUnavailable
from stoker_storeagent.ports import Inspected, OnBytes
from stoker_storeagent.sources.urls import file_path
from stoker_storeagent.threads import in_thread

PIECE_BYTES = 4 * 1024 * 1024
"""Read at once; so long may it take until a cancellation is seen."""


class DirectorySource:
    """Implements ports.Source for `file://` and absolute paths. A shard's version is its size: a file has no other.

    allowed_roots: a source lies under one of them once links are followed.
    """

    kind = "file"

    def __init__(self, allowed_roots: Sequence[Path]) -> None:
        self._allowed_roots = allowed_roots

    async def inspect(self, url: str) -> Inspected:
        return await asyncio.to_thread(self._inspect, url)

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def work() -> None:
            target = resolve_inside(self.directory(url), shard)
            _read(target, version, offset, into, cancelled, lambda done: loop.call_soon_threadsafe(on_bytes, done))

        await in_thread(work, cancelled)

    def directory(self, url: str) -> Path:
        """The directory that a source means, without links. Blocks on the disk.

        Raises RefusedCheckpoint for what is no directory's name, is missing or is not allowed.
        """
        named = file_path(url)
        try:
            root = named.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise RefusedCheckpoint(str(named), getattr(error, "strerror", None) or "a loop of links") from error
        if not any(root.is_relative_to(allowed.resolve()) for allowed in self._allowed_roots):
            raise RefusedCheckpoint(
                str(named), "it lies outside of the directories that STOKER_STOREAGENT_ALLOWED_ROOTS allows"
            )
        return root

    def _inspect(self, url: str) -> Inspected:
        found = inspect_directory(self.directory(url))
        return Inspected(
            source=found.root.as_uri(),
            manifest=_of_contents(found.manifest),
            config=found.config,
            small_files=found.small_files,
            versions={shard.name: str(shard.size_bytes) for shard in found.manifest.shards},
        )


def _of_contents(manifest: Manifest) -> Manifest:
    """Without the times of the files that were parsed: what is registered is their contents."""
    shards = tuple(msgspec.structs.replace(shard, mtime_ns=-1) for shard in manifest.shards)
    return msgspec.structs.replace(manifest, shards=shards)


def _read(
    path: Path,
    version: str,
    offset: int,
    into: memoryview,
    cancelled: threading.Event,
    on_bytes: Callable[[int], object],
) -> None:
    """Fill `into`, unless it is cancelled. Raises CheckpointChanged, RefusedCheckpoint, SourceUnavailable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: it may be a pipe by now
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        size_bytes = os.fstat(descriptor).st_size
        if version not in ("", str(size_bytes)):
            raise CheckpointChanged(str(path), f"it has {size_bytes} bytes, not the {version} that were registered")
        os.posix_fadvise(descriptor, offset, len(into), os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < len(into) and not cancelled.is_set():
            count = os.preadv(descriptor, [into[done : done + PIECE_BYTES]], offset + done)
            if not count:
                raise CheckpointChanged(str(path), f"it ends at byte {offset + done}, before what was registered does")
            done += count
            on_bytes(done)
    except OSError as error:
        raise SourceUnavailable(str(path), f"reading at byte {offset}: {error.strerror or error}") from error
    finally:
        os.close(descriptor)

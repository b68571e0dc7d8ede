"""The SSD tier's directory: chunks under the digests of their contents, and a folder for each model.

    <root>/chunks/<first two hex>/<32 hex of the xxh3-128>   a complete chunk
    <root>/parts/<model_id>/<position>                       a chunk so far: its first bytes
    <root>/parts/BOOT                                        of the boot since which the parts were written
    <root>/models/<model_id>/…                               small files, stoker.manifest, record.json, each shard's header
                                                             alone under its name (who wants data is refused), and
                             learnt.log                      digests by position, while they are not bound
    <root>/.tmp-…                                            leftovers; a start removes them

A chunk has its name only once its bytes are on the disk; a folder is complete from the moment it has its name. Parts
survive the process but not the machine. Names of folders are durable; that of a chunk may be lost with the power, which
costs fetching it again.
Everything below chunks, parts and models is this class's to remove; of what else lies at the top level only leftovers
and models as earlier versions kept them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path

import msgspec
import xxhash

from stoker_checkpoint.header import bare_header
from stoker_checkpoint.leased import MANIFEST, encode_manifest
from stoker_checkpoint.manifest import is_plain_name
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.writing import Writer
from stoker_core.errors import RefusedCheckpoint
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_storeagent.adapters.ssd_files import (
    LEARNT,
    RECORD,
    RESERVED,
    Layout,
    disk_errors,
    read_bounded,
    sync_directory,
    write_new,
)
from stoker_storeagent.adapters.ssd_part import Direct, SsdPart
from stoker_storeagent.adapters.ssd_start import Record, learnt_entry, read_record, scan
from stoker_storeagent.ports import DiskContents
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.threads import Threads

log = get_logger("ssd")

_CHECK_BYTES = 2**20


class SsdDirectory:
    """Implements `ports.Disk`. Calls about one model follow one another, but for `learn`; others may overlap.

    Raises TierFull where something is written, StorageFailed everywhere, and RefusedCheckpoint for an id, digest or file
    name that must not become a path.
    threads: how many block on the disk at most, and as many write; each has a buffer of 1 MiB while it checks a chunk.
    """

    def __init__(self, root: Path, ids: Ids, *, threads: int) -> None:
        self.root = root
        self._layout = Layout(root, ids)
        self._threads = Threads(threads, "ssd")
        self._writer = Writer(threads)
        self._direct = Direct()

    async def open(self) -> DiskContents:
        """Also removes what a crash left and what cannot be used. Before anything else; no part may be open."""

        def work() -> DiskContents:
            with disk_errors(self.root):
                return scan(self._layout)

        return await self._threads.run(work)

    def close(self) -> None:
        """Wait for what the disk is doing; blocks. After the last call."""
        self._writer.close()
        self._threads.close()

    async def free_bytes(self) -> int:
        """Free for this user on the file system."""

        def work() -> int:
            with disk_errors(self.root):
                return shutil.disk_usage(self.root).free

        return await self._threads.run(work)

    def folder(self, model_id: str) -> Path:
        return self._layout.folder(model_id)

    def chunk(self, digest: str) -> Path:
        return self._layout.chunk(digest)

    async def keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        """In a folder that exists, files are replaced one by one: who has its path always finds every one of them."""
        for name in files or ():
            if not is_plain_name(name) or name in RESERVED:
                raise RefusedCheckpoint(name, "is no plain file name")
        await self._threads.run(partial(self._keep, checkpoint, files))

    async def forget(self, model_id: str) -> None:
        await self._threads.run(partial(self._forget, self._layout.folder(model_id), self._layout.parts_of(model_id)))

    async def touch(self, model_id: str) -> None:
        record = self._layout.folder(model_id) / RECORD

        def work() -> None:
            with disk_errors(record):
                try:
                    os.utime(record)
                except FileNotFoundError:
                    return  # forgotten meanwhile

        await self._threads.run(work)

    async def learn(self, model_id: str, position: int, digest: str) -> None:
        """Not synced: a lost entry costs fetching one chunk again."""
        self._layout.chunk(digest)
        path = self._layout.folder(model_id) / LEARNT
        entry = learnt_entry(position, digest)

        def work() -> None:
            with disk_errors(path, len(entry)):
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if os.write(descriptor, entry) != len(entry):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                finally:
                    os.close(descriptor)

        await self._threads.run(work)

    async def part(self, model_id: str, position: int) -> SsdPart:
        part = SsdPart(self._layout, self._threads, self._writer, self._direct, model_id, position)
        try:
            await part.open()
        except BaseException:
            part.close()
            raise
        return part

    async def remove(self, digest: str) -> None:
        path = self._layout.chunk(digest)

        def work() -> None:
            with disk_errors(path):
                path.unlink(missing_ok=True)

        await self._threads.run(work)

    async def open_chunk(self, digest: str) -> int:
        path = self._layout.chunk(digest)
        opened: list[int] = []

        def work() -> None:
            with disk_errors(path):
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))

        try:
            await self._threads.run(work)
        except BaseException:  # cancelled: the thread may have opened it all the same
            for descriptor in opened:
                os.close(descriptor)
            raise
        return opened[0]

    async def intact(self, digest: str) -> bool:
        return await self._threads.run(partial(_intact, self._layout.chunk(digest)))

    def _keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        folder = self._layout.folder(checkpoint.model_id)
        if files is None:
            files = {}
            with disk_errors(folder):
                sizes = read_record(folder).files
        else:
            files = dict(files) | {shard.name: bare_header(shard) for shard in checkpoint.manifest.shards}
            sizes = {name: len(content) for name, content in files.items()}
        record = Record(
            model_id=checkpoint.model_id,
            name=checkpoint.name,
            source=checkpoint.source,
            versions=checkpoint.versions,
            small_bytes=checkpoint.small_bytes,
            files=sizes,
        )
        # The record last: it says what the others must be.
        contents = files | {
            MANIFEST: encode_manifest(checkpoint.manifest),
            RECORD: msgspec.json.format(msgspec.json.encode(record)),
        }
        with disk_errors(folder, sum(map(len, contents.values()))):
            if folder.is_dir():
                self._replace(folder, contents, {*sizes, *([] if checkpoint.bound else [LEARNT])})
            else:
                self._make(folder, contents)

    def _make(self, folder: Path, contents: Mapping[str, bytes]) -> None:
        fresh = self._layout.leftover(folder.name)
        try:
            fresh.mkdir(mode=0o700)
            for name, content in contents.items():
                write_new(fresh / name, content)
            sync_directory(fresh)
            fresh.rename(folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)  # what cannot be removed now is a leftover of the next start
            raise
        sync_directory(folder.parent)

    def _replace(self, folder: Path, contents: Mapping[str, bytes], others: Set[str]) -> None:
        """others: names that may stay as they are."""
        for name, content in contents.items():
            if not _holds(folder / name, content):
                self._layout.write(folder / name, content)
        for path in list(folder.iterdir()):
            if path.name not in contents and path.name not in others:
                self._layout.remove(path)
        sync_directory(folder)

    def _forget(self, folder: Path, parts: Path) -> None:
        for path in (folder, parts):
            with disk_errors(path):
                if path.is_dir():
                    self._layout.remove(path)
                    sync_directory(path.parent)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_bounded(path, len(content)) == content
    except (OSError, ValueError):
        return False  # whatever is there is replaced


def _intact(path: Path) -> bool:
    buffer = memoryview(bytearray(_CHECK_BYTES))
    found, size_bytes = xxhash.xxh3_128(), 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # What memory has of it says nothing of the disk; and afterwards it only takes the place of something useful.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while size_bytes <= CHUNK_BYTES and (size := os.readv(descriptor, [buffer])):
                found.update(buffer[:size])
                size_bytes += size
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("chunk_unreadable", path=str(path), error=error.strerror)
        return False
    return 0 < size_bytes <= CHUNK_BYTES and found.hexdigest() == path.name

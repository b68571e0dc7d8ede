"""The SSD tier's directory: one plain directory per model, complete from the moment it has its name.

    <root>/<model_id>/…              the files and stoker.json
    <root>/.tmp-<model_id>-<id>/     a copy in progress, or one being removed; a start removes them

Everything here blocks on the disk and is called in threads, unless it says otherwise.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from stoker_checkpoint.digests import ChunkDigests
from stoker_checkpoint.directory import resolve_inside
from stoker_checkpoint.manifest import is_plain_name
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint, Stopping, StorageFailed, TierFull
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_db.ports import ModelFile

log = get_logger("ssd")

MANIFEST = "stoker.json"
MANIFEST_BYTES_MAX = 16 * 1024 * 1024
_FORMATS = (1, 2)
_LEFTOVER = ".tmp-"
_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """digest: of the whole file.  mtime_ns: -1 if not known.  chunk_digests: as `stoker_checkpoint.digests`; empty if not known."""

    path: str
    size_bytes: int
    digest: str
    mtime_ns: int = -1
    chunk_digests: tuple[str, ...] = ()


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """stoker.json: what a directory of the tier must hold, so that it can be used without the database.

    Format 1 knew neither times nor digests of chunks.
    """

    model_id: str
    name: str
    files: tuple[StoredFile, ...]
    format: int = 2

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class SsdDirectory:
    """Nothing under `root` is removed that this class did not write."""

    def __init__(self, root: Path, ids: Ids) -> None:
        self.root = root
        self._ids = ids

    def path(self, model_id: str) -> Path:
        if not _MODEL_ID.fullmatch(model_id):
            raise RefusedCheckpoint(model_id, "is no model id")
        return self.root / model_id

    def open(self) -> list[tuple[StoredModel, float]]:
        """Make the directory, remove what unfinished copies left, return complete models: (what, when filled, by mtime).

        Raises StorageFailed.
        """
        found = []
        with _writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(self.root.iterdir()):
                if path.name.startswith(_LEFTOVER):
                    shutil.rmtree(path)
                    log.info("leftover_removed", path=str(path))
                elif (stored := _adoptable(path)) is None:
                    continue
                elif (lack := _lack(path, stored)) is None:
                    found.append((stored, (path / MANIFEST).stat().st_mtime))
                else:
                    shutil.rmtree(path)
                    log.warning("incomplete_removed", path=str(path), reason=lack)
        return found

    def stored(self, model_id: str) -> StoredModel:
        """What a model's directory must hold. Raises CorruptCheckpoint if that is not known any more."""
        path = self.path(model_id)
        try:
            return _read_manifest(path)
        except OSError as error:
            raise CorruptCheckpoint(str(path / MANIFEST), error.strerror or str(error)) from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise CorruptCheckpoint(str(path / MANIFEST), str(error)) from error

    def free_bytes(self) -> int:
        """Free for this user on the file system."""
        with _writing(self.root):
            return shutil.disk_usage(self.root).free

    def begin(self, model_id: str, files: Sequence[ModelFile]) -> Path:
        """A temporary directory with room for `files` allocated. Raises TierFull if the disk has none, StorageFailed."""
        path = self._leftover(model_id)
        try:
            with _writing(path, sum(file.size_bytes for file in files)):
                path.mkdir(mode=0o700)
                for file in files:
                    if not is_plain_name(file.path) or file.path == MANIFEST:
                        raise RefusedCheckpoint(file.path, "is no plain file name")
                    _allocate(path / file.path, file.size_bytes)
        except BaseException:
            self.abandon(path)
            raise
        return path

    def copy(
        self,
        source: Path,
        target: Path,
        file: ModelFile,
        *,
        chunk_bytes: int,
        cancelled: threading.Event,
        on_bytes: Callable[[int], None],
    ) -> StoredFile:
        """Copy one file from directory to directory and put it on the disk; returns what was written.

        on_bytes: told the bytes done so far.
        Raises RefusedCheckpoint if it is gone or unreadable, CorruptCheckpoint if it has another size than registered,
        TierFull, StorageFailed, and Stopping once `cancelled` is set.
        """
        origin = resolve_inside(source, file.path)
        destination = target / file.path
        digest, chunks = hashlib.sha256(), ChunkDigests()
        done = 0
        buffer = memoryview(bytearray(chunk_bytes))
        with _writing(destination, file.size_bytes), ExitStack() as files:
            with _reading(origin):
                reader = files.enter_context(origin.open("rb", buffering=0))
            writer = files.enter_context(destination.open("r+b", buffering=0))
            while True:
                if cancelled.is_set():
                    raise Stopping
                with _reading(origin):
                    chunk = buffer[: reader.readinto(buffer)]
                done += len(chunk)
                if done > file.size_bytes or not chunk:
                    break
                digest.update(chunk)
                chunks.update(chunk)
                _write_all(writer.fileno(), chunk)
                on_bytes(done)
            if done != file.size_bytes:
                has = "more than" if done > file.size_bytes else f"{done} bytes instead of"
                raise CorruptCheckpoint(str(origin), f"it has {has} the {file.size_bytes} bytes that were registered")
            os.fsync(writer.fileno())
            mtime_ns = os.fstat(writer.fileno()).st_mtime_ns
        return StoredFile(
            path=file.path,
            size_bytes=file.size_bytes,
            digest=f"sha256:{digest.hexdigest()}",
            mtime_ns=mtime_ns,
            chunk_digests=chunks.finish(),
        )

    def publish(self, temporary: Path, stored: StoredModel) -> Path:
        """Give a complete copy its name, durably. Raises TierFull, StorageFailed."""
        final = self.path(stored.model_id)
        with _writing(final, MANIFEST_BYTES_MAX):
            with (temporary / MANIFEST).open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(stored)))
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(temporary)
            if final.exists():  # not a copy of ours that is in use: the ledger knows those
                self.discard(self.set_aside(stored.model_id))
            temporary.rename(final)
            _sync_directory(self.root)
        return final

    def set_aside(self, model_id: str) -> Path:
        """Take a model's name away at once (a rename; no need of a thread). Returns what is to be discarded."""
        aside = self._leftover(model_id)
        with _writing(self.root):
            self.path(model_id).rename(aside)
        return aside

    def discard(self, path: Path) -> None:
        """Remove a temporary directory. Raises StorageFailed."""
        with _writing(path):
            shutil.rmtree(path)

    def abandon(self, path: Path) -> None:
        """Remove what a failed copy left, as far as that is possible now; the next start removes the rest."""
        shutil.rmtree(path, ignore_errors=True)

    def _leftover(self, model_id: str) -> Path:
        return self.root / f"{_LEFTOVER}{self.path(model_id).name}-{self._ids.new('copy')}"


def _adoptable(path: Path) -> StoredModel | None:
    """The manifest of a directory that this tier wrote; None, said in the log, for anything else."""
    try:
        return _read_manifest(path)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("not_adopted", path=str(path), reason=str(error))
        return None


def _read_manifest(path: Path) -> StoredModel:
    """Raises OSError, ValueError, MsgspecError."""
    if (path / MANIFEST).stat().st_size > MANIFEST_BYTES_MAX:
        raise ValueError(f"{MANIFEST} is too large")
    stored = msgspec.json.decode((path / MANIFEST).read_bytes(), type=StoredModel)
    if stored.format not in _FORMATS or stored.model_id != path.name or not _MODEL_ID.fullmatch(path.name):
        raise ValueError(f"{MANIFEST} is not this directory's")
    return stored


def _lack(path: Path, stored: StoredModel) -> str | None:
    for file in stored.files:
        try:
            status = (path / file.path).lstat() if is_plain_name(file.path) else None
        except FileNotFoundError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != file.size_bytes:
            return f"{file.path} is no file of {file.size_bytes} bytes"
    return None


@contextmanager
def _writing(path: Path, need_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise TierFull("ssd", need_bytes, 0) from error
        raise StorageFailed(str(path), error.strerror or str(error)) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedCheckpoint(str(path), error.strerror or str(error)) from error


def _allocate(path: Path, size_bytes: int) -> None:
    """A full disk shows here, before anything was copied."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What the parts of the SSD tier's directory share: the layout's names, and file operations. All of it blocks on the disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker_checkpoint.leased import MANIFEST
from stoker_core.errors import RefusedCheckpoint, StorageFailed, TierFull
from stoker_core.ids import Ids

RECORD = "record.json"
LEARNT = "learnt.log"
BOOT = "BOOT"
LEFTOVER = ".tmp-"
RESERVED = (MANIFEST, RECORD, LEARNT)
"""Of a model's folder: no small file has these names."""
MODEL_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")

_DIGEST = re.compile(r"xxh3_128:([0-9a-f]{32})")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Layout:
    """The paths below a tier's root. Every name is checked before it becomes one."""

    def __init__(self, root: Path, ids: Ids) -> None:
        self.root = root
        self.chunks, self.parts, self.models = root / "chunks", root / "parts", root / "models"
        self._ids = ids

    def chunk(self, digest: str) -> Path:
        """Raises RefusedCheckpoint if that is no digest."""
        found = _DIGEST.fullmatch(digest)
        if found is None:
            raise RefusedCheckpoint(digest, "is no digest of a chunk")
        return self.chunks / found[1][:2] / found[1]

    def folder(self, model_id: str) -> Path:
        """Raises RefusedCheckpoint if that is no model id."""
        return self.models / _checked(model_id)

    def parts_of(self, model_id: str) -> Path:
        return self.parts / _checked(model_id)

    def leftover(self, what: str) -> Path:
        """A name that no file has, and that a start removes."""
        return self.root / f"{LEFTOVER}{what}-{self._ids.new('ssd')}"

    def remove(self, path: Path) -> None:
        """A directory loses its name first, so that nobody ever finds half of one."""
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        aside = self.leftover("gone")
        path.rename(aside)
        shutil.rmtree(aside)

    def write(self, path: Path, content: bytes) -> None:
        """Put a file there with its contents on the disk, or leave the one that is there as it is."""
        fresh = self.leftover("file")
        try:
            write_new(fresh, content)
            fresh.rename(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def _checked(model_id: str) -> str:
    if not MODEL_ID.fullmatch(model_id):
        raise RefusedCheckpoint(model_id, "is no model id")
    return model_id


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


@contextmanager
def disk_errors(path: Path, need_bytes: int = 0) -> Iterator[None]:
    """OSErrors become TierFull if it is for want of room, else StorageFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise TierFull("ssd", need_bytes, 0) from error
        raise StorageFailed(str(path), error.strerror or str(error)) from error


def write_new(path: Path, content: bytes) -> None:
    """Make a file, and put its contents on the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """Raises ValueError if it has more, or is no regular file."""
    # O_NONBLOCK: opening a FIFO would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path.name} is no file")
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise ValueError(f"{path.name} has more than {bytes_max} bytes")
    return content


def sync_directory(path: Path) -> None:
    """Names in it survive a power loss from then on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

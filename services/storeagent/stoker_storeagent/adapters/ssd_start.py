"""What a start finds in the SSD tier's directory, and what it removes there. All of it blocks on the disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.manifest import is_plain_name
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import ReadFailed, RefusedCheckpoint, StorageFailed
from stoker_core.logging import get_logger
from stoker_storeagent.adapters.ssd_files import (
    BOOT,
    LEARNT,
    LEFTOVER,
    MODEL_ID,
    RECORD,
    RESERVED,
    Layout,
    is_digest,
    read_bounded,
)
from stoker_storeagent.ports import DiskContents
from stoker_storeagent.records import Checkpoint

log = get_logger("ssd")

FORMAT = 3
RECORD_BYTES_MAX = 16 * 2**20
LEARNT_BYTES_MAX = 64 * 2**20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OLD_RECORD = "stoker.json"
_OLD_FORMATS = (1, 2)
_BROKEN = (errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What says something of one file. Other errors would be of all: for them nothing is removed."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """record.json: with the manifest beside it, all of a `Checkpoint`. files: the folder's small ones → bytes."""

    model_id: str
    name: str
    source: str
    versions: dict[str, str]
    small_bytes: int
    files: dict[str, int]
    format: int = FORMAT


class _OldRecord(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    format: int


def scan(layout: Layout) -> DiskContents:
    """Make the directories, remove what cannot be used, and say what there is. Raises OSError."""
    layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _clear_top(layout)
    for path in (layout.chunks, layout.parts, layout.models):
        path.mkdir(mode=0o700, exist_ok=True)
    chunks = dict(_chunks(layout))
    models = _models(layout)
    checkpoints = {checkpoint.model_id: checkpoint for checkpoint, _ in models}
    learnt = {model_id: _learnt(layout, of, chunks) for model_id, of in checkpoints.items()}
    _clear_parts(layout, checkpoints, learnt, chunks)
    return DiskContents(
        checkpoints=tuple(checkpoints.values()),
        used_s={checkpoint.model_id: used_s for checkpoint, used_s in models},
        chunks=chunks,
        learnt={model_id: of for model_id, of in learnt.items() if of},
    )


def read_record(folder: Path) -> Record:
    """Raises OSError, ValueError, MsgspecError."""
    record = msgspec.json.decode(read_bounded(folder / RECORD, RECORD_BYTES_MAX), type=Record)
    if record.format != FORMAT or record.model_id != folder.name or not MODEL_ID.fullmatch(folder.name):
        raise ValueError(f"{RECORD} is not this folder's")
    return record


def _clear_top(layout: Layout) -> None:
    ours = {layout.chunks, layout.parts, layout.models}
    outdated = 0
    for path in sorted(layout.root.iterdir()):
        if path.name.startswith(LEFTOVER):
            layout.remove(path)
            log.info("leftover_removed", path=str(path))
        elif _is_outdated(path):
            layout.remove(path)
            outdated += 1
        elif path not in ours:
            log.warning("not_adopted", path=str(path), reason="it is not the storage agent's")
    if outdated:
        log.info("older_format_removed", path=str(layout.root), models=outdated)


def _is_outdated(path: Path) -> bool:
    """Whether it is a whole model, as earlier versions kept them: a copy of what the model's source has."""
    try:
        old = msgspec.json.decode(read_bounded(path / _OLD_RECORD, RECORD_BYTES_MAX), type=_OldRecord)
    except (OSError, ValueError, msgspec.MsgspecError):
        return False
    return old.format in _OLD_FORMATS and old.model_id == path.name and path.is_dir() and not path.is_symlink()


def _chunks(layout: Layout) -> Iterator[tuple[str, int]]:
    for directory in sorted(layout.chunks.iterdir()):
        if len(directory.name) != 2 or not stat.S_ISDIR(directory.lstat().st_mode):
            _remove(layout, directory, "it is no directory of chunks")
            continue
        wrong = []
        with os.scandir(directory) as entries:  # not a list of them: there may be very many
            for entry in entries:
                status, digest = entry.stat(follow_symlinks=False), f"xxh3_128:{entry.name}"
                usable = is_digest(digest) and entry.name.startswith(directory.name)
                if usable and stat.S_ISREG(status.st_mode) and 1 <= status.st_size <= CHUNK_BYTES:
                    yield digest, status.st_size
                else:
                    wrong.append(Path(entry.path))
        for path in wrong:
            _remove(layout, path, "it is no chunk")


def _models(layout: Layout) -> list[tuple[Checkpoint, float]]:
    """With the times of their last use, the longest ago first."""
    found = []
    for folder in sorted(layout.models.iterdir()):
        try:
            found.append((_checkpoint(folder), (folder / RECORD).stat().st_mtime))
        except (ValueError, msgspec.MsgspecError, RefusedCheckpoint) as error:
            _remove(layout, folder, str(error))
        except ReadFailed as error:
            if error.errno not in _BROKEN:
                raise StorageFailed(str(folder), str(error)) from error
            _remove(layout, folder, str(error))
        except OSError as error:
            if error.errno not in _BROKEN:
                raise
            _remove(layout, folder, str(error))
    return sorted(found, key=lambda one: (one[1], one[0].model_id))


def _checkpoint(folder: Path) -> Checkpoint:
    """Raises OSError, ValueError, MsgspecError, ReadFailed, RefusedCheckpoint."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise ValueError("it is no folder")
    record = read_record(folder)
    for name, size_bytes in record.files.items():
        status = (folder / name).lstat() if is_plain_name(name) and name not in RESERVED else None
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            raise ValueError(f"{name} is no file of {size_bytes} bytes")
    return Checkpoint(
        model_id=record.model_id,
        name=record.name,
        source=record.source,
        manifest=read_manifest(folder),
        versions=record.versions,
        small_bytes=record.small_bytes,
    )


def _learnt(layout: Layout, checkpoint: Checkpoint, chunks: dict[str, int]) -> dict[int, str]:
    """Position → digest, of chunks that are there. The file says no more than that afterwards."""
    path = layout.folder(checkpoint.model_id) / LEARNT
    if checkpoint.bound:
        path.unlink(missing_ok=True)  # a crash came before that
        return {}
    try:
        content = read_bounded(path, LEARNT_BYTES_MAX)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _remove(layout, path, str(error))
        return {}
    positions = checkpoint.positions
    found: dict[int, str] = {}
    entries = [entry for entry in content.split(b"\n") if entry]
    for entry in entries:
        position, _, digest = entry.decode("ascii", "replace").partition(" ")
        if not (position.isascii() and position.isdigit() and len(position) <= 9 and is_digest(digest)):
            continue  # torn
        if int(position) < positions and chunks.get(digest) == checkpoint.place(int(position))[2]:
            found[int(position)] = digest
    if len(found) != len(entries):
        layout.write(path, b"".join(learnt_entry(position, digest) for position, digest in found.items()))
        log.info("learnt_dropped", model=checkpoint.model_id, entries=len(entries) - len(found))
    return found


def learnt_entry(position: int, digest: str) -> bytes:
    """A line that begins with its line break: one that was torn by a full disk or a crash ends where the next begins.

    The digest stands last and has one length, so that no part of an entry looks like a whole one.
    """
    return f"\n{position} {digest}".encode()


def _clear_parts(
    layout: Layout, checkpoints: dict[str, Checkpoint], learnt: dict[str, dict[int, str]], chunks: dict[str, int]
) -> None:
    """Keep those that were written since the machine started, belong to a model and are still wanted.

    After a power loss a file may have its size and not its bytes, and of the chunks of a model whose digests are not
    bound nobody could tell.
    """
    boot_id = BOOT_ID.read_bytes().strip()
    boot = layout.parts / BOOT
    try:
        same_boot = read_bounded(boot, 4096) == boot_id
    except (FileNotFoundError, ValueError):
        same_boot = False
    for directory in sorted(layout.parts.iterdir()):
        if directory == boot:
            continue
        checkpoint = checkpoints.get(directory.name)
        if not same_boot or checkpoint is None or not stat.S_ISDIR(directory.lstat().st_mode):
            reason = "the machine has restarted since" if not same_boot else "it belongs to no model"
            _remove(layout, directory, reason)
            continue
        for path in sorted(directory.iterdir()):
            if not _is_wanted(path, checkpoint, learnt[checkpoint.model_id], chunks):
                layout.remove(path)
    if not same_boot:  # only now: if this is cut short, the next start removes the rest
        layout.write(boot, boot_id)


def _is_wanted(path: Path, checkpoint: Checkpoint, learnt: dict[int, str], chunks: dict[str, int]) -> bool:
    position = int(path.name) if path.name.isascii() and path.name.isdigit() and len(path.name) <= 9 else -1
    if str(position) != path.name or position >= checkpoint.positions:
        return False
    status = path.lstat()
    known = learnt.get(position) or checkpoint.digest(position)
    return stat.S_ISREG(status.st_mode) and 0 < status.st_size <= checkpoint.place(position)[2] and known not in chunks


def _remove(layout: Layout, path: Path, reason: str) -> None:
    log.warning("unusable_removed", path=str(path), reason=reason)
    layout.remove(path)

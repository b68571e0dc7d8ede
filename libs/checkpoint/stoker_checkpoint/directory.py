"""A model directory on a disk: read for what `layout` checks, and never beyond it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import msgspec

from stoker_checkpoint.header import PREFIX_BYTES, Shard, header_length, parse_header, shown
from stoker_checkpoint.layout import (
    SMALL_FILES_BYTES_MAX,
    check_entries,
    check_names,
    check_small_bytes,
    file_in,
    find_shards,
    read_configs,
    small_names,
)
from stoker_checkpoint.manifest import Manifest, build_manifest, is_plain_name
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint


class CheckpointDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that may be served. root: without symlinks.  small_files: contents by name, the index of shards included.

    Whatever else lies in the directory does not belong to the model.
    """

    root: Path
    manifest: Manifest
    config: dict[str, Any]
    small_files: dict[str, bytes]

    @property
    def total_bytes(self) -> int:
        return self.manifest.file_bytes + sum(map(len, self.small_files.values()))


def inspect_directory(directory: Path) -> CheckpointDirectory:
    """Read headers and small files of a model directory. Blocks on the disk: call it in a thread.

    Raises RefusedCheckpoint for what cannot be served safely or at all, with the file and the reason, and its subclass
    CorruptCheckpoint for a safetensors file or index that breaks its format.
    """
    try:
        root = directory.resolve(strict=True)
        names = entries(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
        raise unreadable(directory, error) from error
    check_names(str(root), names)
    contents = read_small_files(root, small_names(names))
    config = read_configs(str(root), contents)
    return CheckpointDirectory(
        root=root, manifest=read_manifest(root, names, contents), config=config, small_files=contents
    )


def resolve_inside(root: Path, name: str) -> Path:
    """The regular file that `name` means directly inside `root` (which has no symlinks), links followed.

    Raises RefusedCheckpoint if it is missing, leaves the root, or is no regular file.
    """
    path = root / name
    if not is_plain_name(name):
        raise RefusedCheckpoint(str(root), f"{shown(name)} is no plain file name")
    try:
        target = path.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    if not target.is_relative_to(root):
        raise RefusedCheckpoint(str(path), "it is a link that leaves the model's directory; copy the files (cp -rL)")
    if not regular:
        raise RefusedCheckpoint(str(path), "it is no regular file")
    return target


def entries(root: Path) -> set[str]:
    """Names of what lies in `root`. Raises OSError, RefusedCheckpoint for too many."""
    names: set[str] = set()
    with os.scandir(root) as found:
        for entry in found:
            names.add(entry.name)
            check_entries(str(root), len(names))
    return names


def read_small_files(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Raises RefusedCheckpoint, also if they are too large together."""
    contents: dict[str, bytes] = {}
    total_bytes = 0
    for name in names:
        target = resolve_inside(root, name)
        try:
            with target.open("rb") as file:
                content = file.read(SMALL_FILES_BYTES_MAX - total_bytes + 1)
        except OSError as error:
            raise unreadable(target, error) from error
        total_bytes += len(content)
        check_small_bytes(str(root), name, total_bytes)
        contents[name] = content
    return contents


def read_manifest(root: Path, names: Set[str], contents: Mapping[str, bytes]) -> Manifest:
    """Parse the headers of the shards that belong to the model. Raises as `inspect_directory`.

    names: of the directory's entries.  contents: of its small files; only the index of shards is looked at.
    """
    wanted, index = find_shards(str(root), names, contents)
    return build_manifest(str(root), [read_shard(root, name) for name in wanted], index)


def read_shard(root: Path, name: str) -> Shard:
    """Parse one safetensors file's header. Blocks on the disk.

    Raises RefusedCheckpoint as `resolve_inside` does, CorruptCheckpoint if it breaks the format.
    """
    target = resolve_inside(root, name)
    path = file_in(str(root), name)
    try:
        with target.open("rb") as file:
            found = os.fstat(file.fileno())
            file_bytes = found.st_size
            length = header_length(path, file.read(PREFIX_BYTES), file_bytes)
            header = file.read(length)
    except OSError as error:
        raise unreadable(target, error) from error
    if len(header) != length:
        raise CorruptCheckpoint(path, f"it ended at byte {PREFIX_BYTES + len(header)}, inside its header")
    return parse_header(path, name, header, file_bytes, mtime_ns=found.st_mtime_ns)


def unreadable(path: Path, error: Exception) -> RefusedCheckpoint:
    """`error` of the operating system, as the reason why `path` cannot be served."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error)
    return RefusedCheckpoint(str(path), reason)

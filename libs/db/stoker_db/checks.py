"""What both implementations refuse before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint
from stoker_db.ports import ModelFile


def check_files(files: Sequence[ModelFile]) -> None:
    """Raises RefusedCheckpoint for a path that is empty, absolute, leaves its root or repeats, and for a negative size."""
    seen: set[str] = set()
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in file.path or str(path) != file.path:
            raise RefusedCheckpoint(file.path, "is no plain relative path")
        if file.path in seen:
            raise RefusedCheckpoint(file.path, "is listed twice")
        if file.size_bytes < 0:
            raise RefusedCheckpoint(file.path, f"has a size of {file.size_bytes} bytes")
        seen.add(file.path)


def check_chunks(bound: Mapping[str, Sequence[str]], digests: Mapping[str, Sequence[str]]) -> None:
    """Raises CorruptCheckpoint if one of `digests` differs from what is `bound` to its path (empty: nothing yet)."""
    for path, found in sorted(digests.items()):
        known = bound.get(path, ())
        if not known:
            continue
        for chunk, (digest, registered) in enumerate(zip(found, known, strict=False)):
            if digest != registered:
                raise CorruptCheckpoint(path, f"chunk {chunk} has digest {digest}; {registered} was registered")
        if len(found) != len(known):
            first = min(len(found), len(known))
            raise CorruptCheckpoint(
                path, f"differs from chunk {first} on: it has {len(found)} chunks; {len(known)} were registered"
            )

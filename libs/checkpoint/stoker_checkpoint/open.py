"""Open a checkpoint: from a directory or file of safetensors to its manifest."""

from __future__ import annotations

from pathlib import Path

from stoker_checkpoint.directory import entries, read_manifest, read_shard, read_small_files, unreadable
from stoker_checkpoint.layout import INDEX
from stoker_checkpoint.manifest import Manifest, build_manifest
from stoker_core.errors import RefusedCheckpoint


def open_checkpoint(path: Path) -> Manifest:
    """Parse every header of the checkpoint at `path`. Blocks on the disk: call it in a thread.

    path: a directory with an index of shards or a single `model.safetensors`, or one safetensors file. Its shards lie
    in that directory, or in the file's own.
    Raises RefusedCheckpoint for what cannot be served, its subclass CorruptCheckpoint for what breaks the format.
    """
    try:
        if not path.is_dir():
            if path.suffix != ".safetensors":
                raise RefusedCheckpoint(str(path), "it is neither a directory nor a safetensors file")
            root = path.parent.resolve(strict=True)
            return build_manifest(str(path), [read_shard(root, path.name)])
        root = path.resolve(strict=True)
        names = entries(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
        raise unreadable(path, error) from error
    return read_manifest(root, names, read_small_files(root, [INDEX] if INDEX in names else []))

"""A model's folder as a storage agent leases it: of its shards the headers alone, and a manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

from stoker_checkpoint.header import bare_header
from stoker_checkpoint.leased import MANIFEST, encode_manifest
from stoker_checkpoint.manifest import Manifest


def leased_folder(source: Path, manifest: Manifest, folder: Path) -> Path:
    """Make `folder` from the small files of `source`. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    for shard in manifest.shards:
        (folder / shard.name).write_bytes(bare_header(shard))
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return folder

"""The loader in its plainest form: what the native one is compared with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.tensors import torch_type
from stoker_core.errors import CorruptCheckpoint, InvalidRequest, ReadFailed

if TYPE_CHECKING:
    import torch


def read_reference(
    manifest: Manifest, directory: Path, names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors called `names` (None: all), each read by itself into memory of its own, in the order of the files.

    Raises ReadFailed, CorruptCheckpoint where a file ends too early, InvalidRequest for an unknown name.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for shard in manifest.shards:
        path = directory / shard.name
        for tensor in shard.tensors:
            if names is not None and tensor.name not in names:
                continue
            dtype, shape = torch_type(directory, tensor)
            try:
                with path.open("rb") as file:
                    file.seek(tensor.offset_bytes)
                    data = bytearray(file.read(tensor.size_bytes))
            except OSError as error:
                raise ReadFailed(str(path), tensor.offset_bytes, error.errno or 0) from error
            if len(data) != tensor.size_bytes:
                raise CorruptCheckpoint(str(path), f"it ends at byte {tensor.offset_bytes + len(data)}")
            owned = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[tensor.name] = owned.reshape(shape)
    if names is not None and (unknown := set(names) - tensors.keys()):
        raise InvalidRequest(f"the checkpoint has no tensor {min(unknown)!r}", "names")
    return tensors

"""The manifest of a checkpoint: every tensor of every shard, and where it lies. Nothing here does I/O."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stoker_checkpoint.header import DTYPE_BITS, Shard, TensorRef, shown
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint

__all__ = ["DTYPE_BITS", "Manifest", "Shard", "TensorRef", "build_manifest", "is_plain_name", "parse_index"]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Shards by name; each one's tensors by offset. Tensor names occur once in all of them."""

    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of data per dtype, the largest first."""
        totals: Counter[str] = Counter()
        for tensor in self.tensors:
            totals[tensor.dtype] += tensor.size_bytes
        return dict(totals.most_common())

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(shard.size_bytes - shard.data_offset_bytes for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a visible file directly inside its directory: no separator, no '..'."""
    try:
        size_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return False
    return 0 < size_bytes <= 255 and not name.startswith(".") and "/" not in name and "\0" not in name


def parse_index(path: str, content: bytes) -> dict[str, str]:
    """Tensor name → shard, from a `model.safetensors.index.json`.

    Raises RefusedCheckpoint if it names a file outside its own directory, CorruptCheckpoint if it is malformed.
    """
    try:
        index: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(path, f"no valid JSON: {shown(error)}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(path, "it has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CorruptCheckpoint(path, f"weight_map[{shown(tensor)}] is no file name")
        if not is_plain_name(shard):
            raise RefusedCheckpoint(
                path, f"it names {shown(shard)}; a shard must be a plain file name beside the index"
            )
        if not shard.endswith(".safetensors"):
            raise RefusedCheckpoint(path, f"it names {shown(shard)}, which is no safetensors file")
    return weight_map


def build_manifest(path: str, shards: Sequence[Shard], index: Mapping[str, str] | None = None) -> Manifest:
    """Join shards, and check them against one another and against the index.

    path: the directory, for messages.  index: tensor name → shard.
    Raises CorruptCheckpoint for a name that occurs twice, a shard that is missing, a tensor that is not where the index says.
    """
    where: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in where:
                raise CorruptCheckpoint(
                    path, f"tensor {shown(tensor.name)} is in both {where[tensor.name]} and {shard.name}"
                )
            where[tensor.name] = shard.name
    if not where:
        raise CorruptCheckpoint(path, "it holds no tensor")
    present = {shard.name for shard in shards}
    for name, named in (index or {}).items():
        if named not in present:
            raise CorruptCheckpoint(path, f"the index names the shard {shown(named)}, which is missing")
        if where.get(name) != named:
            raise CorruptCheckpoint(path, f"the index says that {named} holds tensor {shown(name)}, but it does not")
    return Manifest(shards=tuple(sorted(shards, key=lambda shard: shard.name)))

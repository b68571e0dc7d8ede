"""The manifest of a checkpoint as bytes: of a leased folder, which has no shards to read headers from, and in a catalogue.

Format: MAGIC, the xxh3-128 of what follows, then msgpack. Where a tensor begins is not stored: it is the end of the one before.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash

from stoker_checkpoint.digests import DIGEST_PATTERN
from stoker_checkpoint.header import DTYPE_BITS, Shard, TensorRef, shown
from stoker_checkpoint.manifest import Manifest, build_manifest, is_plain_name
from stoker_checkpoint.plan import chunk_count
from stoker_core.errors import CorruptCheckpoint, ReadFailed, RefusedCheckpoint

MANIFEST = "stoker.manifest"
"""Its name in a leased folder."""
MANIFEST_BYTES_MAX = 256 * 2**20
_MAGIC = b"StkMani1"
_DIGEST_BYTES = 16
_HEAD_BYTES = len(_MAGIC) + _DIGEST_BYTES

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern=rf"\A{DIGEST_PATTERN}\Z")]


class _Tensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    name: str
    dtype: str
    shape: tuple[_Natural, ...]
    size_bytes: _Size


class _Shard(msgspec.Struct, frozen=True, array_like=True):
    name: str
    size_bytes: _Size
    data_offset_bytes: _Size
    mtime_ns: int
    digests: tuple[_Digest, ...]
    metadata: dict[str, str]
    tensors: tuple[_Tensor, ...]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[_Shard, ...])


def encode_manifest(manifest: Manifest) -> bytes:
    """manifest: of `build_manifest`, with or without digests. Raises RefusedCheckpoint if it is over MANIFEST_BYTES_MAX."""
    content = _ENCODER.encode(tuple(_packed(shard) for shard in manifest.shards))
    data = _MAGIC + xxhash.xxh3_128_digest(content) + content
    if len(data) > MANIFEST_BYTES_MAX:
        raise RefusedCheckpoint(MANIFEST, f"the manifest has {len(data)} bytes; the limit is {MANIFEST_BYTES_MAX}")
    return data


def decode_manifest(data: bytes | memoryview, path: str | Path) -> Manifest:
    """What `encode_manifest` made. path: for messages.  Raises CorruptCheckpoint, whatever the bytes are."""
    where = str(path)
    if len(data) > MANIFEST_BYTES_MAX:
        raise CorruptCheckpoint(where, f"it has more than {MANIFEST_BYTES_MAX} bytes")
    if data[: len(_MAGIC)] != _MAGIC:
        raise CorruptCheckpoint(where, "it is no manifest, or one of another version")
    content = memoryview(data)[_HEAD_BYTES:]
    if xxhash.xxh3_128_digest(content) != data[len(_MAGIC) : _HEAD_BYTES]:
        raise CorruptCheckpoint(where, "its digest is wrong")
    try:
        packed = _DECODER.decode(content)
        manifest = build_manifest(where, [_unpacked(shard) for shard in packed])
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptCheckpoint(where, f"it is malformed: {shown(error)}") from error
    if [shard.name for shard in manifest.shards] != sorted({shard.name for shard in packed}):
        raise CorruptCheckpoint(where, "it names a shard twice")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Of a leased folder. Blocks on the disk. Raises CorruptCheckpoint, ReadFailed also if it is not there."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise ReadFailed(str(path), 0, error.errno or 0) from error
    return decode_manifest(data, path)


def _packed(shard: Shard) -> _Shard:
    return _Shard(
        name=shard.name,
        size_bytes=shard.size_bytes,
        data_offset_bytes=shard.data_offset_bytes,
        mtime_ns=shard.mtime_ns,
        digests=shard.digests,
        metadata=shard.metadata,
        tensors=tuple(_Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes) for tensor in shard.tensors),
    )


def _unpacked(packed: _Shard) -> Shard:
    """Raises ValueError for what no file can hold."""
    name, end = packed.name, packed.data_offset_bytes
    if not is_plain_name(name):
        raise ValueError(f"{shown(name)} is no plain file name")
    tensors = []
    for tensor in packed.tensors:
        size = tensor.size_bytes
        if math.prod(tensor.shape) * DTYPE_BITS.get(tensor.dtype, 0) != 8 * size or tensor.dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {shown(tensor.name)}: its dtype, shape and size do not fit")
        tensors.append(
            TensorRef(
                name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, shard=name, offset_bytes=end, size_bytes=size
            )
        )
        end += size
    if end != packed.size_bytes:
        raise ValueError(f"{shown(name)} has {packed.size_bytes} bytes, its tensors end at {end}")
    if packed.digests and len(packed.digests) != chunk_count(packed.size_bytes):
        raise ValueError(f"{shown(name)} has {len(packed.digests)} digests")
    return Shard(
        name=name,
        size_bytes=packed.size_bytes,
        data_offset_bytes=packed.data_offset_bytes,
        tensors=tuple(tensors),
        metadata=packed.metadata,
        mtime_ns=packed.mtime_ns,
        digests=packed.digests,
    )

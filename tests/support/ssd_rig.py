"""What tests of the SSD tier's directory share: a small checkpoint, its bytes, and memory as the pool has it."""

import contextlib
import mmap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.manifest import Manifest, Shard, TensorRef
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.ids import RandomIds
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.records import Checkpoint

HEADER_BYTES = 128
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
SHARDS = ("a.safetensors", "b.safetensors")
SIZES = (CHUNK_BYTES, 5000, 9000)
"""Of the positions that `a_checkpoint` has."""


def content(size: int, seed: int = 0) -> bytes:
    """Its period is prime: bytes from a wrong place differ."""
    return (bytes(range(1, 252)) * (size // 251 + 2))[seed % 251 :][:size]


def digest_of(position: int) -> str:
    return chunk_digest(content(SIZES[position], position))


def _shard(name: str, size: int) -> Shard:
    data = size - HEADER_BYTES
    tensor = TensorRef(
        name=name, dtype="U8", shape=(data,), shard=f"{name}.safetensors", offset_bytes=HEADER_BYTES, size_bytes=data
    )
    return Shard(
        name=f"{name}.safetensors", size_bytes=size, data_offset_bytes=HEADER_BYTES, tensors=(tensor,), metadata={}
    )


def a_checkpoint(model_id: str = "model-1", *, bound: bool = False) -> Checkpoint:
    """Positions 0 and 1 are of the first shard, 2 is all of the second."""
    made = Checkpoint(
        model_id=model_id,
        name="m",
        source="s3://bucket/m",
        manifest=Manifest(shards=(_shard("a", SIZES[0] + SIZES[1]), _shard("b", SIZES[2]))),
        versions={"a.safetensors": '"etag"', "b.safetensors": ""},
        small_bytes=sum(map(len, FILES.values())),
    )
    return made.with_digests(made.by_shard([digest_of(position) for position in range(3)])) if bound else made


def pool_memory(data: bytes) -> memoryview:
    """Its address is a multiple of a page's size."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


@contextlib.contextmanager
def a_directory(root: Path, threads: int = 4) -> Iterator[SsdDirectory]:
    """Closed afterwards, but not opened."""
    ssd = SsdDirectory(root, RandomIds(), threads=threads)
    try:
        yield ssd
    finally:
        ssd.close()


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[SsdDirectory]:
    with a_directory(root) as ssd:
        await ssd.open()
        yield ssd


async def put(ssd: SsdDirectory, model_id: str, position: int) -> str:
    """A whole chunk of `a_checkpoint`. Returns its digest."""
    part = await ssd.part(model_id, position)
    await part.write(pool_memory(content(SIZES[position], position)))
    await part.finish(digest_of(position))
    return digest_of(position)

"""Models of so many chunks, and leases of them as an instance takes them: by descriptors, tensor by tensor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.lease_client import LeaseClient, lease_client
from tests.support.services import eventually
from tests.support.storeagent_rig import Agent
from tests.support.tiny_model import write_safetensors, write_tiny_model

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.load import LoadedCheckpoint, attach
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_contracts.control import Done
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted
from stoker_core.errors import StokerError

SHARD = "model.safetensors"


def write_model(directory: Path, chunks: int, seed: int = 0) -> Path:
    """A model whose weights take `chunks` of the pool, the last one in part; a tensor begins in each of them."""
    write_tiny_model(directory, tokenizer=False)
    (directory / "tokenizer.json").write_text("{}")
    sizes = [CHUNK_BYTES - 4097] * (chunks - 1) + [CHUNK_BYTES // 3 + chunks * 4096]
    random = np.random.default_rng(seed)
    tensors = {f"t{i}": ("U8", (size,), random.bytes(size)) for i, size in enumerate(sizes)}
    write_safetensors(directory / SHARD, tensors)
    assert -(-weight_bytes(directory) // CHUNK_BYTES) == chunks
    return directory


def weight_bytes(source: Path) -> int:
    """Of its one shard."""
    return (source / SHARD).stat().st_size


def written(source: Path) -> dict[str, bytes]:
    """Tensors as the files have them."""
    manifest = open_checkpoint(source)
    files = {shard.name: (source / shard.name).read_bytes() for shard in manifest.shards}
    return {t.name: files[t.shard][t.offset_bytes : t.offset_bytes + t.size_bytes] for t in manifest.tensors}


def digests_of(source: Path) -> tuple[str, ...]:
    """Of the chunks of its one shard."""
    data = memoryview((source / SHARD).read_bytes())
    return tuple(chunk_digest(data[begin : begin + CHUNK_BYTES]) for begin in range(0, len(data), CHUNK_BYTES))


def attached(client: LeaseClient, granted: LeaseGranted) -> LoadedCheckpoint:
    folder = Path(granted.path)
    manifest = read_manifest(folder)
    pool_fd, board_fd = client.descriptors
    return attach(manifest, plan_reads(manifest), pool_fd, board_fd, directory=folder)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


async def read(client: LeaseClient, granted: LeaseGranted) -> dict[str, bytes]:
    """Every tensor's bytes, as a consumer gets them. In a thread: the agent lives in this process's loop."""

    def tensors() -> dict[str, bytes]:
        with attached(client, granted) as loaded:
            return {name: _bytes(tensor) for name, tensor in loaded.tensors()}

    return await asyncio.to_thread(tensors)


async def read_one(client: LeaseClient, granted: LeaseGranted, name: str) -> bytes:
    """One tensor, as soon as its chunks are there."""

    def tensor() -> bytes:
        with attached(client, granted) as loaded:
            return _bytes(loaded.tensor(name))

    return await asyncio.to_thread(tensor)


@contextlib.asynccontextmanager
async def leased(
    store: Agent, model_id: str, instance_id: str = "instance-1"
) -> AsyncIterator[tuple[LeaseClient, LeaseGranted]]:
    async with lease_client(store.socket) as client:
        yield client, await client.lease(model_id, instance_id)


async def lease_once(store: Agent, model_id: str) -> Tier:
    """Lease, read everything, give it back, and wait until that is seen."""
    async with leased(store, model_id) as (client, granted):
        await read(client, granted)
    await eventually(lambda: not any(h.leases for h in store.held() + store.held(Tier.DRAM)), what="the lease's end")
    return granted.source


async def lease_right(store: Agent, model_id: str, source: Path) -> Tier:
    """As `lease_once`; what comes is what `source` has."""
    async with leased(store, model_id) as (client, granted):
        assert await read(client, granted) == written(source)
    return granted.source


async def failure(store: Agent, model_id: str, error: type[StokerError]) -> StokerError:
    """What a consumer of a load that fails gets."""
    async with leased(store, model_id) as (client, granted):
        with pytest.raises(error) as caught:
            await read(client, granted)
    return caught.value


async def refused(store: Agent, code: str, tier: Tier = Tier.DRAM) -> None:
    """Until the last refusal of a tier that was told of is this one."""

    def codes() -> list[str]:
        return [data["code"] for data in store.said("refused") if data["tier"] == tier]

    await eventually(lambda: codes()[-1:] == [code], what=lambda: f"{code} of {tier}, not {codes()}")


async def evicted(store: Agent, model_id: str, *tiers: Tier) -> None:
    """Order it until it is done: what is still being copied is in use."""
    for tier in tiers:

        async def gone(tier: Tier = tier) -> bool:
            return isinstance(await store.evict(model_id, tier), Done)

        await eventually(gone, what=f"the end of the model in {tier}")


def dram(store: Agent) -> list[str]:
    return sorted(held.model_id for held in store.held(Tier.DRAM))


def whole(store: Agent, model_id: str, tier: Tier = Tier.SSD) -> bool:
    """Whether all of it lies there, as the status says."""
    return any(h.model_id == model_id and h.held_bytes == h.total_bytes for h in store.held(tier))


async def copied(store: Agent, model_id: str) -> None:
    await eventually(lambda: whole(store, model_id), what="the copy on the SSD")


def chunk_files(store: Agent) -> list[Path]:
    """Of all models, by name."""
    return sorted((store.settings.ssd_path / "chunks").glob("*/*"))


def chunk_of(store: Agent, source: Path, position: int) -> Path:
    """The file of one chunk of a model of one shard."""
    begin = position * CHUNK_BYTES
    wanted = (source / SHARD).read_bytes()[begin : begin + CHUNK_BYTES]
    [found] = [path for path in chunk_files(store) if path.read_bytes() == wanted]
    return found


def flip(path: Path, offset: int = 12345) -> None:
    """A bit that rots on the disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def assert_nothing_torn(store: Agent) -> None:
    """Every chunk on the SSD is what its name says."""
    for path in chunk_files(store):
        assert chunk_digest(path.read_bytes()) == f"xxh3_128:{path.name}"

"""Checkpoints of any dtype, shape and place, written by hand: safetensors' own writer aligns what it writes."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from stoker_checkpoint.header import DTYPE_BITS
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.tensors import TORCH_DTYPES

_PATTERN = bytes(range(1, 252))
"""Its length is prime: bytes from a wrong place differ."""


class TensorSpec(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        bits = DTYPE_BITS[self.dtype]
        for length in self.shape:
            bits *= length
        return bits // 8


class ShardSpec(NamedTuple):
    """padding: spaces after the header's JSON, over those that safetensors itself writes to align the data to 8 bytes."""

    tensors: tuple[TensorSpec, ...]
    padding: int = 0


def pattern(size: int, seed: int) -> bytes:
    begin = seed % len(_PATTERN)
    return (_PATTERN * (size // len(_PATTERN) + 2))[begin : begin + size]


def write_shard(path: Path, spec: ShardSpec, *, seed: int = 0) -> None:
    header, end = {}, 0
    for tensor in spec.tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (end, end + tensor.size_bytes),
        }
        end += tensor.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spec.padding)
    path.write_bytes(struct.pack("<Q", len(text)) + text + pattern(end, seed))


def write_checkpoint(directory: Path, shards: Sequence[ShardSpec]) -> None:
    """One shard is `model.safetensors`; several get an index. Each shard's bytes differ from those of the others."""
    directory.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        write_shard(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, spec in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        write_shard(directory / name, spec, seed=number * 17)
        weight_map.update({tensor.name: name for tensor in spec.tensors})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def plain_checkpoint(directory: Path, *, mib: int = 40, shards: int = 1, tensors: int = 8) -> None:
    """BF16 tensors of equal size, `<shard>.<number>`, `mib` MiB in all."""
    rows = mib * 2**20 // (shards * tensors * 2 * 256)
    write_checkpoint(
        directory,
        [
            ShardSpec(tuple(TensorSpec(f"{shard}.{number}", "BF16", (rows, 256)) for number in range(tensors)))
            for shard in range(shards)
        ],
    )


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """In dtype, shape and every byte: NaNs are equal to themselves."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(expected)
    assert [name for name in expected if not same(loaded[name], expected[name])] == []


@st.composite
def _shapes(draw: st.DrawFn, dtype: str) -> tuple[int, ...]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    return (*shape, 2 * draw(st.integers(0, 3))) if dtype == "F4" else shape


@st.composite
def shard_specs(draw: st.DrawFn, number: int) -> ShardSpec:
    """Small tensors of every dtype; now and then bytes that push what follows over the end of a chunk."""
    tensors = []
    for index in range(draw(st.integers(0 if number else 1, 8))):
        if draw(st.integers(0, 9)) == 0:
            size = draw(st.integers(CHUNK_BYTES - 2000, CHUNK_BYTES + 2000))
            tensors.append(TensorSpec(f"{number}.{index}", "U8", (size,)))
        else:
            dtype = draw(st.sampled_from(sorted(TORCH_DTYPES)))
            tensors.append(TensorSpec(f"{number}.{index}", dtype, draw(_shapes(dtype))))
    return ShardSpec(tuple(tensors), draw(st.integers(0, 70)))


@st.composite
def checkpoint_specs(draw: st.DrawFn) -> list[ShardSpec]:
    return [draw(shard_specs(number)) for number in range(draw(st.integers(1, 5)))]

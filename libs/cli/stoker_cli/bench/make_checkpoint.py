"""A checkpoint to measure with: the names, shapes and shards of a transformer, random bytes, and a pickled twin."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stoker_core.errors import SetupFailed

SHARD_BYTES_MAX = 2_000_000_000
FORMAT = 1  # grows when what is made changes, so that older ones are not used
SEED = 1
_SPARE_BYTES = 100_000_000
_ITEM_BYTES = 2  # bfloat16
_LAYERS = (
    (500_000_000, 24),
    (2_000_000_000, 28),
    (9_000_000_000, 32),
    (20_000_000_000, 40),
)  # below so many parameters
_LAYERS_MAX = 80
_PER_LAYER = 9
_BESIDE_LAYERS = 3
TENSORS_MIN = _PER_LAYER + _BESIDE_LAYERS
_BIASES = (
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.bias",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
    "mlp.down_proj.bias",
    "self_attn.sinks",
)
_INDEX = "model.safetensors.index.json"
_STAMP = "stamp.json"

Shapes = list[tuple[str, tuple[int, ...]]]
Progress = Callable[[str], None]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark reads.

    files: the shards.  pickles: the same tensors by torch.save, or none.  record: JSON, name → [shape, digest].
    """

    directory: Path
    files: tuple[Path, ...]
    pickles: tuple[Path, ...]
    record: Path
    total_bytes: int
    tensors: int


def transformer(total_bytes: int, tensors: int | None = None) -> Shapes:
    """Names and shapes of a Llama-like model in bfloat16 that fills `total_bytes` to within a row of its vocabulary.

    tensors: how many exactly, at least TENSORS_MIN; None: as models of that size have.
    Raises SetupFailed if total_bytes are too few for so many tensors.
    """
    parameters = total_bytes // _ITEM_BYTES
    if tensors is None:
        tensors = _PER_LAYER * next((n for below, n in _LAYERS if parameters < below), _LAYERS_MAX) + _BESIDE_LAYERS
    layers, extra = divmod(tensors - _BESIDE_LAYERS, _PER_LAYER)
    # Like Llama 3: a layer has 13 h² weights; six sevenths of all in layers, the rest in the two embeddings.
    hidden = math.isqrt(parameters * 6 // 7 // (13 * layers)) // 16 * 16
    if hidden < 16:
        raise SetupFailed(f"{total_bytes} bytes are too few for a model of {tensors} tensors; ask for fewer or more GB")
    body: Shapes = []
    for layer in range(layers):
        body += [(f"model.layers.{layer}.{name}", shape) for name, shape in _layer(hidden)]
    body += [(f"model.layers.0.{name}", (hidden,)) for name in _BIASES[:extra]]
    body.append(("model.norm.weight", (hidden,)))
    vocabulary = (parameters - sum(math.prod(shape) for _, shape in body)) // (2 * hidden)
    embedding = (vocabulary, hidden)
    return [("model.embed_tokens.weight", embedding), *body, ("lm_head.weight", embedding)]


def _layer(hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner, kv = hidden * 7 // 2, hidden // 4
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (hidden, hidden)
    yield "self_attn.k_proj.weight", (kv, hidden)
    yield "self_attn.v_proj.weight", (kv, hidden)
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def split(shapes: Shapes, shard_bytes_max: int) -> list[Shapes]:
    """Cut into shards of at most `shard_bytes_max`, in order, as transformers does. A larger tensor is a shard alone."""
    shards: list[Shapes] = []
    room = 0
    for name, shape in shapes:
        size = math.prod(shape) * _ITEM_BYTES
        if size > room or not shards:
            shards.append([])
            room = shard_bytes_max
        shards[-1].append((name, shape))
        room -= size
    return shards


def make(work: Path, total_bytes: int, tensors: int | None, *, pickles: bool, progress: Progress) -> Checkpoint:
    """Make a checkpoint below `work`, or take the one an earlier run made there with the same sizes.

    Raises SetupFailed if the disk has too little room, saying how much is needed.
    """
    wanted = {"format": FORMAT, "seed": SEED, "bytes": total_bytes, "tensors": tensors}
    directory = work / (f"made-{total_bytes}" if tensors is None else f"made-{total_bytes}-{tensors}")
    shapes = transformer(total_bytes, tensors)
    if _stamp(directory) != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        need_room(work, total_bytes)
        directory.mkdir(parents=True)
        _write_shards(directory, split(shapes, SHARD_BYTES_MAX), progress)
        _write_json(directory / _STAMP, wanted)
    return take(directory, directory, pickles=pickles, progress=progress)


def take(directory: Path, work: Path, *, pickles: bool, progress: Progress) -> Checkpoint:
    """A directory of safetensors as it is; its digests and its pickled twin are made below `work`, once.

    Raises SetupFailed if it holds none or the disk has no room for the twin.
    """
    files = tuple(sorted(directory.glob("*.safetensors")))
    if not files:
        raise SetupFailed(f"{directory} holds no *.safetensors")
    stats = [file.stat() for file in files]
    total_bytes = sum(stat.st_size for stat in stats)
    wanted = {
        "format": FORMAT,
        "files": [[file.name, s.st_size, s.st_mtime_ns] for file, s in zip(files, stats, strict=True)],
    }
    digests, twin = work / "digests", work / "pickled"
    record = digests / "tensors.json"
    if _stamp(digests) != wanted:
        progress("recording a digest of every tensor")
        shutil.rmtree(digests, ignore_errors=True)
        digests.mkdir(parents=True)
        _write_json(record, {name: entry for file in files for name, entry in _digests(file)})
        _write_json(digests / _STAMP, wanted)
    if pickles and _stamp(twin) != wanted:
        shutil.rmtree(twin, ignore_errors=True)
        need_room(work, total_bytes)
        twin.mkdir(parents=True)
        _write_twin(twin, files, progress)
        _write_json(twin / _STAMP, wanted)
    return Checkpoint(
        directory=directory,
        files=files,
        pickles=tuple(sorted(twin.glob("*.bin"))) if pickles else (),
        record=record,
        total_bytes=total_bytes,
        tensors=len(json.loads(record.read_bytes())),
    )


def need_room(directory: Path, size_bytes: int) -> None:
    """Raises SetupFailed if the disk of `directory` has less than `size_bytes` and a little left."""
    directory.mkdir(parents=True, exist_ok=True)
    need, free = size_bytes + _SPARE_BYTES, shutil.disk_usage(directory).free
    if free < need:
        raise SetupFailed(
            f"{need / 1e9:.1f} GB of disk are needed in {directory}, which has {free / 1e9:.1f} GB free; "
            "choose another with --work, or a smaller --gb"
        )


def need_direct(file: Path) -> None:
    """Raises SetupFailed if the file system of `file` refuses O_DIRECT: then there is no raw device to compare with."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        raise SetupFailed(
            f"the file system of {file} refuses O_DIRECT ({error.strerror}); choose another, such as ext4 or xfs, with --work"
        ) from error


def _write_shards(directory: Path, shards: Sequence[Shapes], progress: Progress) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {tensor: _random(shape, generator) for tensor, shape in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        progress(f"writing {name}: {len(tensors)} tensors, {size / 1e9:.2f} GB")
        save_file(tensors, directory / name, metadata={"format": "pt"})
        _flush(directory / name)
        where |= dict.fromkeys(tensors, name)
    total = sum(math.prod(shape) * _ITEM_BYTES for shard in shards for _, shape in shard)
    _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _random(shape: tuple[int, ...], generator: Any) -> Any:
    """Random bits: nothing on the way to the disk can compress them."""
    import torch

    items = math.prod(shape)
    bits = torch.empty(-(-items // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return bits.view(torch.bfloat16)[:items].view(shape)


def _write_twin(directory: Path, files: Sequence[Path], progress: Progress) -> None:
    import torch
    from safetensors.torch import load_file

    for number, file in enumerate(files, start=1):
        name = f"pytorch_model-{number:05}-of-{len(files):05}.bin"
        progress(f"writing {name} for torch.load")
        torch.save(load_file(file), directory / name)
        _flush(directory / name)


def _digests(file: Path) -> Iterator[tuple[str, list[Any]]]:
    """Name → [shape, digest] of a shard's tensors, by plain reads: what no loader under test has touched."""
    import xxhash

    with file.open("rb") as shard:
        header = json.loads(shard.read(int.from_bytes(shard.read(8), "little")))
        data = shard.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shard.seek(data + begin)
                yield name, [entry["shape"], xxhash.xxh3_128_hexdigest(shard.read(end - begin))]


def _stamp(directory: Path) -> Any:
    """What a finished directory was made as; None if it was not finished."""
    try:
        return json.loads((directory / _STAMP).read_bytes())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
    _flush(path)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""From a path to a manifest, and what is derived of it without the native module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from tests.support.checkpoints import ShardSpec, TensorSpec, plain_checkpoint, write_checkpoint, write_shard

from stoker_checkpoint.digests import chunk_digest, digest_manifest
from stoker_checkpoint.header import DTYPE_BITS, TensorRef
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.reference import read_reference
from stoker_checkpoint.tensors import TORCH_DTYPES, torch_type
from stoker_core.errors import CheckpointChanged, CorruptCheckpoint, InvalidRequest, ReadFailed, RefusedCheckpoint

SMALL = ShardSpec((TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "U8", ())))


def test_a_directory_with_one_file_needs_no_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [SMALL])
    manifest = open_checkpoint(tmp_path)
    assert [tensor.name for tensor in manifest.tensors] == ["a", "b"]
    assert manifest.shards[0].mtime_ns == (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert manifest.shards[0].digests == ()


def test_a_directory_with_an_index_is_opened_by_it(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path, mib=1, shards=3)
    write_shard(tmp_path / "other.safetensors", SMALL)
    assert [shard.name for shard in open_checkpoint(tmp_path).shards] == [
        f"model-0000{n}.safetensors" for n in range(3)
    ]


def test_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    write_shard(tmp_path / "any.safetensors", SMALL)
    assert [shard.name for shard in open_checkpoint(tmp_path / "any.safetensors").shards] == ["any.safetensors"]


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", "model.bin", "empty"])
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.bin").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedCheckpoint, match=name):
        open_checkpoint(tmp_path / name)


def test_a_loop_of_links_and_a_link_outside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RefusedCheckpoint):
        open_checkpoint(tmp_path / "loop")
    write_shard(tmp_path / "real.safetensors", SMALL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "real.safetensors")
    with pytest.raises(RefusedCheckpoint, match="leaves"):
        open_checkpoint(tmp_path / "model")


def test_digests_are_one_per_chunk_the_last_up_to_the_end(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path, mib=20)
    manifest = digest_manifest(open_checkpoint(tmp_path), tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert manifest.shards[0].digests == (chunk_digest(content[:CHUNK_BYTES]), chunk_digest(content[CHUNK_BYTES:]))
    assert chunk_digest(b"abc") == "xxh3_128:" + xxhash.xxh3_128(b"abc").hexdigest()


def test_digests_of_a_file_that_is_gone_or_another_one_are_not_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [SMALL])
    manifest = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    os.utime(path, ns=(0, 1))
    with pytest.raises(CheckpointChanged):
        digest_manifest(manifest, tmp_path)
    path.unlink()
    with pytest.raises(ReadFailed, match="No such file"):
        digest_manifest(manifest, tmp_path)


def ref(dtype: str, *shape: int) -> TensorRef:
    return TensorRef(name="t", dtype=dtype, shape=shape, shard="s", offset_bytes=0, size_bytes=0)


def test_elements_have_as_many_bits_in_torch_as_in_the_file() -> None:
    for dtype in TORCH_DTYPES:
        kind, shape = torch_type(Path(), ref(dtype, 3, 8))
        assert kind.itemsize * 8 * torch.Size(shape).numel() == DTYPE_BITS[dtype] * 24
    assert torch_type(Path(), ref("F4", 3, 8)) == (torch.float4_e2m1fn_x2, (3, 4))


@pytest.mark.parametrize("tensor", [ref("F6_E2M3", 8), ref("F4", 2, 3), ref("F4")])
def test_what_torch_cannot_hold_is_refused_and_named(tensor: TensorRef) -> None:
    with pytest.raises(RefusedCheckpoint, match="d/s: tensor 't'"):
        torch_type(Path("d"), tensor)


def test_the_reference_names_what_it_cannot_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [SMALL])
    manifest = open_checkpoint(tmp_path)
    with pytest.raises(InvalidRequest, match="'c'"):
        read_reference(manifest, tmp_path, ["a", "c"])
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match="ends at byte"):
        read_reference(manifest, tmp_path)
    path.unlink()
    with pytest.raises(ReadFailed):
        read_reference(manifest, tmp_path, ["a"])


def test_who_only_opens_and_plans_imports_neither_torch_nor_the_native_module() -> None:
    code = """
import sys
import stoker_checkpoint.directory, stoker_checkpoint.open, stoker_checkpoint.plan, stoker_checkpoint.digests
assert not {"torch", "stoker_checkpoint._native"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

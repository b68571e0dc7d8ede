"""Tensors out of a load: the same as the oracle's, as soon as they are there, and valid for as long as they are kept."""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.native.conftest import ENGINES, POOL_CHUNKS
from tests.support.checkpoints import (
    ShardSpec,
    TensorSpec,
    assert_same,
    checkpoint_specs,
    plain_checkpoint,
    same,
    write_checkpoint,
)

from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.load import LoadedCheckpoint, attach, load
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.readers import Engine
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import InvalidRequest, LoadCancelled, ReadFailed, RefusedCheckpoint


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[Engine, Pool]]:
    pools = {engine: Pool(24 * CHUNK_BYTES, huge="none", lock=False, reader=engine) for engine in ENGINES}
    yield pools
    for pool in pools.values():
        assert pool.native.chunks_free == pool.native.chunks_total
        pool.close()


async def gathered(tensors: AsyncIterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor async for name, tensor in tensors}


def taken(loaded: LoadedCheckpoint, how: str, names: list[str]) -> dict[str, torch.Tensor]:
    if how == "async":
        return asyncio.run(gathered(loaded.atensors()))
    if how == "by name":
        return {name: loaded.tensor(name) for name in names}
    return dict(loaded.tensors())


@given(checkpoint_specs(), st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_loads_are_equal_to_the_oracle(
    pools: dict[Engine, Pool], tmp_path_factory: pytest.TempPathFactory, specs: list[ShardSpec], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, specs)
    manifest = open_checkpoint(directory)
    names = [tensor.name for tensor in manifest.tensors]
    wanted = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(names), unique=True)), "names")
    verify = data.draw(st.booleans(), "verify")
    window = data.draw(st.sampled_from([0, 0, 1, 2, 3]), "window")
    how = data.draw(st.sampled_from(["in order", "async"] if window else ["in order", "async", "by name"]), "how")
    if verify:
        manifest = digest_manifest(manifest, directory)
    expected = read_reference(manifest, directory, wanted)
    with load(
        manifest,
        pools[data.draw(st.sampled_from(ENGINES), "engine")],
        directory,
        names=wanted,
        verify=verify,
        window_bytes=window * CHUNK_BYTES,
    ) as loaded:
        tensors = taken(loaded, how, list(expected))
        assert_same(tensors, expected)
        assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in tensors.values())
    assert_same(tensors, expected)
    for file in directory.iterdir():
        file.unlink()


def test_the_oracle_is_equal_to_what_safetensors_saved(pool: Pool, tmp_path: Path) -> None:
    saved = {
        "a": torch.arange(100_000, dtype=torch.float32).reshape(100, 1000),
        "b": torch.tensor(3.5, dtype=torch.bfloat16),
        "c": torch.randn(7, 3).to(torch.float8_e4m3fn),
        "d": torch.zeros(0, 4, dtype=torch.int16),
        "e": torch.tensor([True, False]),
    }
    save_file(saved, tmp_path / "model.safetensors")
    manifest = open_checkpoint(tmp_path)
    with load(manifest, pool, tmp_path) as loaded:
        for tensors in (dict(loaded.tensors()), read_reference(manifest, tmp_path)):
            assert tensors.keys() == saved.keys()
            assert all(same(tensors[name], saved[name]) for name in saved)


def test_a_dtype_that_torch_lacks_is_refused(pool: Pool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [ShardSpec((TensorSpec("a", "F6_E2M3", (4,)),))])
    with (
        load(open_checkpoint(tmp_path), pool, tmp_path) as loaded,
        pytest.raises(RefusedCheckpoint, match="'a': this torch has no dtype F6_E2M3"),
    ):
        list(loaded.tensors())


def test_tensors_are_views_of_the_pool(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    with (
        pool.read(plan, manifest, model) as reading,
        attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model) as loaded,
    ):
        name, tensor = next(loaded.tensors())
        at = plan.offsets[name]
        pool.chunk(reading.chunks[0])[at : at + 2] = b"\x80\x3f"  # one, as bfloat16
        assert tensor.flatten()[0] == 1


def test_what_a_consumer_writes_is_seen_by_nobody_else(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    expected = read_reference(manifest, model)
    with pool.read(plan, manifest, model) as reading:

        def consumer() -> LoadedCheckpoint:
            return attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model)

        with consumer() as mine, consumer() as other:
            for _, tensor in mine.tensors():
                tensor.zero_()
            assert_same(dict(other.tensors()), expected)
        with consumer() as later:
            assert_same(dict(later.tensors()), expected)


def test_tensors_come_while_later_chunks_are_still_to_be_read(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with load(manifest, pool, model, window_bytes=CHUNK_BYTES) as loaded:
        tensors = loaded.tensors()
        assert next(tensors)[0] == "0.0"  # a window of one chunk: the second cannot have been read
        assert not loaded.wait(0)
        assert len(list(tensors)) == 7
        assert loaded.wait(0)


def spoil_free_chunks(pool: Pool) -> None:
    """Overwrite every chunk that is free."""
    chunks = pool.native.allocate(pool.native.chunks_free)
    assert chunks is not None
    for chunk in chunks:
        pool.chunk(chunk)[:] = b"\xee" * CHUNK_BYTES
    pool.native.free(chunks)


def test_tensors_that_are_kept_stay_valid_when_their_chunks_are_used_again(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    expected = read_reference(manifest, model)
    with load(manifest, pool, model) as loaded:
        kept = dict(loaded.tensors())
        part = kept.pop("0.3")[5:9]  # its storage alone is kept, and by another tensor
        array = kept.pop("0.4").view(torch.int16).numpy()
    spoil_free_chunks(pool)
    assert same(part, expected["0.3"][5:9])
    assert same(torch.from_numpy(array).view(torch.bfloat16), expected["0.4"])
    assert all(same(tensor, expected[name]) for name, tensor in kept.items())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_tensors_that_are_not_kept_cost_no_memory_when_the_load_closes(pool: Pool, model: Path) -> None:
    with load(open_checkpoint(model), pool, model) as loaded:
        kept = None
        for name, tensor in loaded.tensors():
            if name == "0.2":
                kept = tensor
        del tensor
        gc.collect()
        before = anonymous_bytes()
    assert kept is not None
    assert anonymous_bytes() - before < 10 * 2**20  # one of eight is 5 MiB


def test_a_load_through_a_window_can_be_taken_once_and_in_order(pool: Pool, model: Path) -> None:
    with load(open_checkpoint(model), pool, model, window_bytes=2 * CHUNK_BYTES) as loaded:
        with pytest.raises(InvalidRequest, match="in order only"):
            loaded.tensor("0.0")
        assert len(dict(loaded.tensors())) == 8
        with pytest.raises(InvalidRequest, match="once"):
            next(loaded.tensors())
        with pytest.raises(InvalidRequest, match="once"):
            loaded.touch()


def test_a_second_consumer_of_a_window_is_told_and_gets_no_wrong_bytes(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    expected = read_reference(manifest, model)
    with pool.read(plan, manifest, model, window_chunks=1) as reading:

        def consumer() -> LoadedCheckpoint:
            return attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model)

        with consumer() as first, consumer() as second:
            assert_same(dict(first.tensors()), expected)
            with pytest.raises(InvalidRequest, match="another"):
                dict(second.tensors())


def test_a_directory_whose_name_is_no_utf_8_can_be_loaded(pool: Pool, tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"mod\xe9l")
    plain_checkpoint(directory, mib=1)
    manifest = open_checkpoint(directory)
    with load(manifest, pool, directory) as loaded:
        assert_same(dict(loaded.tensors()), read_reference(manifest, directory))
    (directory / "model.safetensors").unlink()
    with load(manifest, pool, directory) as loaded, pytest.raises(ReadFailed, match="No such file"):
        loaded.wait(30)


def test_a_tensor_larger_than_the_window_comes_through_it(pool: Pool, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        [
            ShardSpec(
                (TensorSpec("a", "F16", (3,)), TensorSpec("b", "U8", (3 * CHUNK_BYTES,)), TensorSpec("c", "F32", (5,)))
            )
        ],
    )
    manifest = open_checkpoint(tmp_path)
    with load(manifest, pool, tmp_path, window_bytes=CHUNK_BYTES) as loaded:
        assert pool.native.chunks_free == POOL_CHUNKS - 1
        assert_same(dict(loaded.tensors()), read_reference(manifest, tmp_path))


@pytest.mark.parametrize("window_bytes", [CHUNK_BYTES, 2 * CHUNK_BYTES])
def test_a_window_goes_over_what_no_tensor_needs_without_reading_over_what_is_not_ready(
    pool: Pool, tmp_path: Path, window_bytes: int
) -> None:
    empty = [ShardSpec((TensorSpec(f"e{n}", "F32", (0,)),), padding=n) for n in range(40)]
    write_checkpoint(tmp_path, [*empty, ShardSpec((TensorSpec("a", "U8", (40_000_000,)),))])
    manifest = digest_manifest(open_checkpoint(tmp_path), tmp_path)
    with load(manifest, pool, tmp_path, window_bytes=window_bytes, verify=True) as loaded:
        assert_same(dict(loaded.tensors()), read_reference(manifest, tmp_path))


@pytest.mark.parametrize("window_bytes", [0, CHUNK_BYTES])
def test_a_load_can_be_touched_without_tensors(pool: Pool, model: Path, window_bytes: int) -> None:
    with load(open_checkpoint(model), pool, model, window_bytes=window_bytes) as loaded:
        loaded.touch()
        assert loaded.wait(0)


def test_an_unknown_tensor_is_refused_by_name(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pytest.raises(InvalidRequest, match="'nope'"):
        load(manifest, pool, model, names=["nope"])
    with load(manifest, pool, model, names=["0.1"]) as loaded, pytest.raises(InvalidRequest, match=r"'0\.0'"):
        loaded.tensor("0.0")


def test_a_closed_load_gives_nothing_more(pool: Pool, model: Path) -> None:
    loaded = load(open_checkpoint(model), pool, model)
    tensors = loaded.tensors()
    next(tensors)
    loaded.close()
    loaded.close()
    with pytest.raises(LoadCancelled):
        next(tensors)
    with pytest.raises(LoadCancelled):
        loaded.tensor("0.0")
    with pytest.raises(LoadCancelled):
        loaded.touch()


def test_ten_thousand_tensors_are_had_in_less_than_half_a_second(pool: Pool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [ShardSpec(tuple(TensorSpec(str(n), "BF16", (32, 32)) for n in range(10_000)))])
    with load(open_checkpoint(tmp_path), pool, tmp_path) as loaded:
        assert loaded.wait(30)
        began = time.perf_counter()
        tensors = dict(loaded.tensors())
        took_s = time.perf_counter() - began
    assert len(tensors) == 10_000
    assert took_s < 0.5

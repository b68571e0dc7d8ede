"""The parts of `stoker bench load` that need no disk to be measured."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from stoker_checkpoint.open import open_checkpoint
from stoker_cli.bench import load_run, make_checkpoint
from stoker_cli.bench.load_contestants import wrong_tensors
from stoker_cli.bench.load_figures import balanced, figures, rotated, sweep_figures, table, with_ratios
from stoker_core.errors import SetupFailed


def sizes(shapes: make_checkpoint.Shapes) -> list[int]:
    return [2 * math.prod(shape) for _, shape in shapes]


@pytest.mark.parametrize("total", [50_000_000, 1_000_000_000, 4_000_000_000, 16_000_000_000])
def test_a_made_model_has_the_bytes_that_were_asked_for(total: int) -> None:
    made = sum(sizes(make_checkpoint.transformer(total)))
    assert 0.999 * total < made <= total


@pytest.mark.parametrize("tensors", [12, 100, 101, 102, 10_000])
def test_a_made_model_has_as_many_tensors_as_asked_for_at_the_same_bytes(tensors: int) -> None:
    shapes = make_checkpoint.transformer(1_000_000_000, tensors)
    assert len(shapes) == len(dict(shapes)) == tensors
    assert 0.999e9 < sum(sizes(shapes)) <= 1e9


def test_a_model_of_too_many_tensors_is_refused() -> None:
    with pytest.raises(SetupFailed, match="10000 tensors"):
        make_checkpoint.transformer(1_000_000, 10_000)


def test_shards_keep_the_order_and_the_limit() -> None:
    shapes = make_checkpoint.transformer(4_000_000_000)
    shards = make_checkpoint.split(shapes, 2_000_000_000)
    assert [tensor for shard in shards for tensor in shard] == shapes
    assert len(shards) == 3
    assert all(sum(sizes(shard)) <= 2_000_000_000 for shard in shards)


def test_a_tensor_larger_than_a_shard_lies_alone() -> None:
    assert make_checkpoint.split([("a", (8,)), ("b", (100,)), ("c", (8,))], 20) == [
        [("a", (8,))],
        [("b", (100,))],
        [("c", (8,))],
    ]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES_MAX", 1_000_000)


def made(work: Path, *, pickles: bool = False, said: list[str] | None = None) -> make_checkpoint.Checkpoint:
    return make_checkpoint.make(
        work, 2_000_000, 21, pickles=pickles, progress=[].append if said is None else said.append
    )


@pytest.mark.usefixtures("small_shards")
def test_what_is_made_is_a_sharded_checkpoint_of_bfloat16(tmp_path: Path) -> None:
    checkpoint = made(tmp_path)
    manifest = open_checkpoint(checkpoint.directory)
    assert len(manifest.shards) == len(checkpoint.files) > 1
    assert [*manifest.bytes_by_dtype] == ["BF16"]
    assert len(manifest.tensors) == checkpoint.tensors == 21
    assert manifest.file_bytes == checkpoint.total_bytes
    index = json.loads((checkpoint.directory / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == manifest.data_bytes


@pytest.mark.usefixtures("small_shards")
def test_what_is_made_is_made_once_and_the_same_every_time(tmp_path: Path) -> None:
    said: list[str] = []
    first = made(tmp_path / "a", said=said)
    assert said
    said.clear()
    assert made(tmp_path / "a", said=said) == first
    assert said == []
    again = made(tmp_path / "b")
    assert [file.read_bytes() for file in again.files] == [file.read_bytes() for file in first.files]


@pytest.mark.usefixtures("small_shards")
def test_what_was_not_finished_is_made_anew(tmp_path: Path) -> None:
    checkpoint = made(tmp_path)
    whole = checkpoint.files[0].read_bytes()
    checkpoint.files[0].write_bytes(b"")
    (checkpoint.directory / "stamp.json").unlink()
    assert made(tmp_path).files[0].read_bytes() == whole


@pytest.mark.usefixtures("small_shards")
def test_the_record_finds_every_difference(tmp_path: Path) -> None:
    import torch

    checkpoint = made(tmp_path, pickles=True)
    record = json.loads(checkpoint.record.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.pickles:
        tensors |= torch.load(file)
    assert wrong_tensors(tensors, record) == []
    tensors["lm_head.weight"].view(torch.uint8).view(-1)[-1] ^= 1
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(1, -1)
    tensors["one.too.many"] = tensors.pop("model.embed_tokens.weight")
    assert wrong_tensors(tensors, record) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "one.too.many",
    ]


def test_every_contestant_begins_in_turn() -> None:
    names = ["a", "b", "c"]
    assert [rotated(names, number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (7, 14), (8, 8)])
def test_everyone_follows_everybody_else_equally_often(count: int, rounds: int) -> None:
    orders = [balanced(range(count), number) for number in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    followed = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(followed) == count * (count - 1)
    assert len(set(followed.values())) == 1


def test_the_device_is_the_better_of_both_measurements_of_the_round() -> None:
    one = with_ratios({"fio_s": 1.0, "sequential_s": 2.0, "stoker_s": 1.25}, 2_000_000_000)
    assert one["device_gb_per_s"] == 2.0
    assert one["cold_gb_per_s"] == 1.6
    assert one["cold_over_device"] == pytest.approx(0.8)
    assert with_ratios({"sequential_s": 2.0, "stoker_s": 1.25}, 2_000_000_000)["cold_over_device"] == pytest.approx(1.6)


def test_what_was_not_measured_has_no_figure() -> None:
    one = with_ratios({"runai_s": 1.0}, 1_000_000_000)
    assert one == {"runai_s": 1.0, "runai_gb_per_s": 1.0}
    assert "cold_over_device" not in with_ratios({"stoker_s": 1.0, "runai_s": 2.0}, 1_000_000_000)
    assert "extra_memory_mib" not in figures([one])


def test_figures_are_medians_of_the_rounds_ratios() -> None:
    rounds = [
        with_ratios({"stoker_s": stoker, "runai_s": runai}, 1_000_000_000)
        for stoker, runai in ((1.0, 1.0), (2.0, 8.0), (4.0, 8.0))
    ]
    # The ratio of the medians would be 8 ÷ 2.
    assert figures(rounds)["cold_over_runai"] == 2.0


def test_extra_memory_is_the_worst_of_all_rounds_and_of_reader_and_consumer() -> None:
    rounds = [{"stoker_memory_mib": 3.0, "pool_memory_mib": 9.0}, {"stoker_memory_mib": 4.0, "pool_memory_mib": 1.0}]
    assert figures(rounds)["extra_memory_mib"] == 9.0


def test_the_table_has_a_line_for_everyone_who_ran() -> None:
    one = with_ratios({"fio_s": 1.0, "stoker_s": 1.0, "pool_s": 0.01, "torch_s": 2.0}, 1_000_000_000)
    assert table([one]).row_count == 4


def test_a_sweep_has_figures_for_each_size() -> None:
    cases = [(1.0, 255.0, 1.0), (1.0, 255.0, 3.0), (2.0, 255.0, 4.0), (1.0, 100.0, 2.0)]
    rounds = [{"checkpoint_gb": gb, "tensors": tensors, "stoker_s": seconds} for gb, tensors, seconds in cases]
    assert sweep_figures(rounds) == {
        "gb_1_tensors_255_stoker_s": 2.0,
        "gb_2_tensors_255_stoker_s": 4.0,
        "gb_1_tensors_100_stoker_s": 2.0,
    }


def test_a_disk_that_is_too_small_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match=r"9000000\.1 GB of disk are needed in .*--work"):
        make_checkpoint.need_room(tmp_path, 9_000_000_000_000_000)


def test_memory_that_is_too_small_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_run, "_meminfo_bytes", lambda _: 8_000_000_000)
    load_run.need_memory(1_000_000_000, 1_000_000_000, load_run.CONTESTANTS["cpu"])
    with pytest.raises(SetupFailed, match=r"13\.5 GB of memory are needed, 8\.0 GB are free"):
        load_run.need_memory(4_000_000_000, 4_000_000_000, load_run.CONTESTANTS["cpu"])
    load_run.need_memory(4_000_000_000, 4_000_000_000, ["stoker"])  # nobody needs room for a copy


def test_contestants_that_are_not_installed_are_left_out_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_run, "installed", lambda distribution: distribution != "fastsafetensors")
    monkeypatch.setattr(load_run.shutil, "which", lambda _: None)
    names, missing = load_run.choose([], "cpu")
    assert names == ["sequential", "stoker", "runai", "safetensors", "safetensors_mapped", "torch"]
    assert missing[0].endswith("apt install fio")
    assert "pip install --no-deps fastsafetensors" in missing[1]


def test_a_contestant_that_there_is_not_is_refused() -> None:
    with pytest.raises(SetupFailed, match="--only rocket: there are fio"):
        load_run.choose(["rocket"], "cpu")


@pytest.mark.usefixtures("small_shards")
def test_a_pool_that_cannot_hold_the_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = made(tmp_path)
    need = len(checkpoint.files) * 16 * 2**20
    assert load_run.pool_bytes(checkpoint, None) == need
    assert load_run.pool_bytes(checkpoint, 1.0) == 1_000_000_000
    with pytest.raises(SetupFailed, match=r"--pool-gb 0\.01 is too small"):
        load_run.pool_bytes(checkpoint, 0.01)


def test_the_way_to_a_gpu_is_compared_with_memcpy_and_with_the_disk() -> None:
    one = with_ratios({"sequential_s": 1.0, "stoker_s": 2.0, "pool_s": 0.5, "memcpy_s": 0.25}, 1_000_000_000)
    assert one["disk_to_gpu_gb_per_s"] == 0.5
    assert one["disk_to_gpu_over_disk"] == 0.5
    assert one["dram_to_gpu_gb_per_s"] == 2.0
    assert one["dram_to_gpu_over_memcpy"] == 0.5


def test_a_device_that_there_is_not_is_refused() -> None:
    with pytest.raises(SetupFailed, match="--device tpu: there are cpu and cuda"):
        load_run.need_device("tpu")


def test_without_a_gpu_the_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from stoker_checkpoint import _native

    monkeypatch.setattr(_native, "cuda_available", lambda: (False, "no CUDA driver"))
    with pytest.raises(SetupFailed, match="--device cuda: no CUDA driver"):
        load_run.need_device("cuda")

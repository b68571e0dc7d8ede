"""What is read of a checkpoint. Pure: no file is opened."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_checkpoint.header import Shard, TensorRef
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.plan import ALIGN_BYTES, CHUNK_BYTES, GAP_BYTES_MAX, ReadPlan, plan_reads
from stoker_core.errors import InvalidRequest


def shard(name: str, header: int, *sizes: int) -> Shard:
    """Tensors `<name>0`, `<name>1`, … of these sizes, one after the other."""
    refs, end = [], header
    for number, size in enumerate(sizes):
        refs.append(
            TensorRef(name=f"{name}{number}", dtype="U8", shape=(size,), shard=name, offset_bytes=end, size_bytes=size)
        )
        end += size
    return Shard(name=name, size_bytes=end, data_offset_bytes=header, tensors=tuple(refs), metadata={})


def manifest(*shards: Shard) -> Manifest:
    return Manifest(shards=shards)


SIZES = st.one_of(
    st.integers(0, 40),
    st.integers(0, 3 * ALIGN_BYTES),
    st.integers(GAP_BYTES_MAX - ALIGN_BYTES, GAP_BYTES_MAX + 3 * ALIGN_BYTES),
    st.integers(CHUNK_BYTES - ALIGN_BYTES, CHUNK_BYTES + ALIGN_BYTES),
    st.integers(0, 3 * CHUNK_BYTES),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    headers = st.one_of(st.integers(9, 300), st.integers(9, 2 * CHUNK_BYTES))
    return manifest(
        *(
            shard(f"s{number}-", draw(headers), *draw(st.lists(SIZES, max_size=6)))
            for number in range(draw(st.integers(1, 4)))
        )
    )


def check_shape(plan: ReadPlan, of: Manifest) -> None:
    """What holds of every plan."""
    sizes = {shard.name: shard.size_bytes for shard in of.shards}
    assert len(plan.positions) > 0
    assert list(plan.positions) == sorted(set(plan.positions))
    assert list(plan.extents) == sorted(plan.extents)
    assert [file for file, _ in plan.positions] == sorted(file for file, _ in plan.positions)
    assert {file for file, _ in plan.positions} == set(range(len(plan.shards)))
    assert {position for position, *_ in plan.extents} == set(range(len(plan.positions)))
    end_before = dict.fromkeys(range(len(plan.shards)), 0)
    for position, file, offset, size in plan.extents:
        assert plan.positions[position] == (file, offset // CHUNK_BYTES)
        assert size > 0
        assert offset % ALIGN_BYTES == size % ALIGN_BYTES == 0
        assert offset % CHUNK_BYTES + size <= CHUNK_BYTES
        assert offset >= end_before[file]
        assert offset + size < sizes[plan.shards[file]] + ALIGN_BYTES
        end_before[file] = offset + size
    covered = [min(offset + size, sizes[plan.shards[file]]) - offset for _, file, offset, size in plan.extents]
    assert all(size > 0 for size in covered)
    assert plan.read_bytes == sum(covered)


def check_tensors(plan: ReadPlan, of: Manifest, wanted: set[str]) -> None:
    """Every byte of each wanted tensor is read, to where its offset says."""
    read = {}  # (position, offset in the chunk) → end in the chunk
    for position, _, offset, size in plan.extents:
        read.setdefault(position, []).append((offset % CHUNK_BYTES, offset % CHUNK_BYTES + size))
    assert plan.offsets.keys() == wanted
    for tensor in of.tensors:
        if tensor.name not in wanted or not tensor.size_bytes:
            continue
        at, file_at = plan.offsets[tensor.name], tensor.offset_bytes
        end = at + tensor.size_bytes
        while at < end:
            position, begin = divmod(at, CHUNK_BYTES)
            stop = min(end, (position + 1) * CHUNK_BYTES)
            file, chunk = plan.positions[position]
            assert plan.shards[file] == tensor.shard
            assert chunk * CHUNK_BYTES + begin == file_at
            assert any(low <= begin and begin + stop - at <= high for low, high in read[position])
            file_at += stop - at
            at = stop


@given(manifests(), st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_wanted_byte_is_read_once_to_where_its_tensor_lies(
    of: Manifest, data: st.DataObject, whole: bool
) -> None:
    names = [tensor.name for tensor in of.tensors]
    wanted = set(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else set()
    plan = plan_reads(of, wanted, whole_chunks=whole)
    check_shape(plan, of)
    check_tensors(plan, of, wanted)


@given(manifests())
@settings(max_examples=50, deadline=None)
def test_without_names_whole_files_are_read(of: Manifest) -> None:
    plan = plan_reads(of)
    check_shape(plan, of)
    check_tensors(plan, of, {tensor.name for tensor in of.tensors})
    assert plan.read_bytes == of.file_bytes
    assert plan.shards == tuple(shard.name for shard in of.shards)
    assert plan == plan_reads(of, whole_chunks=True)


@given(manifests(), st.data())
@settings(max_examples=50, deadline=None)
def test_whole_chunks_are_read_from_their_first_byte_to_their_last(of: Manifest, data: st.DataObject) -> None:
    names = [tensor.name for tensor in of.tensors]
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    plan = plan_reads(of, wanted, whole_chunks=True)
    sizes = {shard.name: shard.size_bytes for shard in of.shards}
    assert len(plan.extents) == len(plan.positions)
    for _, file, offset, size in plan.extents:
        assert offset % CHUNK_BYTES == 0
        assert offset + size >= min(offset + CHUNK_BYTES, sizes[plan.shards[file]])


def test_small_gaps_are_read_on_and_large_ones_left_out() -> None:
    small, large = GAP_BYTES_MAX - 2 * ALIGN_BYTES, GAP_BYTES_MAX + 2 * ALIGN_BYTES
    of = manifest(shard("s", 100, 1000, small, 1000, large, 1000))
    plan = plan_reads(of, {"s0", "s2", "s4"})
    assert len(plan.positions) == 1
    assert len(plan.extents) == 2
    assert plan.read_bytes < small + 4 * ALIGN_BYTES


def test_a_gap_is_not_read_to_the_end_of_its_chunk() -> None:
    of = manifest(shard("s", ALIGN_BYTES, 100, CHUNK_BYTES, 100))
    plan = plan_reads(of, {"s0", "s2"})
    assert plan.positions == ((0, 0), (0, 1))
    assert [size for *_, size in plan.extents] == [ALIGN_BYTES, ALIGN_BYTES]


def test_a_shard_of_which_nothing_is_wanted_is_not_touched() -> None:
    of = manifest(shard("a", 50, 10, 10), shard("b", 50, 10), shard("c", 50, 10))
    plan = plan_reads(of, {"a0", "c0"})
    assert plan.shards == ("a", "c")
    assert plan.positions == ((0, 0), (1, 0))


def test_a_tensor_without_bytes_needs_no_read() -> None:
    of = manifest(shard("a", 50, 0, 10), shard("b", 50, CHUNK_BYTES, 0, 10))
    plan = plan_reads(of, {"a0", "b1", "b2"})
    assert plan.shards == ("b",)
    assert plan.positions == ((0, 1),)
    assert plan.offsets == {"a0": 0, "b1": 0, "b2": 50}


@pytest.mark.parametrize("names", [(), ("a0",)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_plan_of_no_bytes_reads_the_start_of_a_file(names: tuple[str, ...], whole: bool) -> None:
    of = manifest(shard("a", 50, 0), shard("b", 50, 10))
    plan = plan_reads(of, names, whole_chunks=whole)
    check_shape(plan, of)
    assert plan.extents == ((0, 0, 0, ALIGN_BYTES),)


def test_an_unknown_name_is_refused_and_named() -> None:
    with pytest.raises(InvalidRequest, match="no tensor 'nope'") as caught:
        plan_reads(manifest(shard("a", 50, 10)), {"a0", "nope"})
    assert caught.value.param == "names"


def seconds_to_plan(tensors: int) -> float:
    of = manifest(*(shard(f"s{number}-", 5000, *[4097] * (tensors // 10)) for number in range(10)))
    names = [tensor.name for tensor in of.tensors][::2]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        plan_reads(of)
        plan_reads(of, names)
        took.append(time.perf_counter() - began)
    return min(took)


def test_planning_takes_time_linear_in_the_number_of_tensors() -> None:
    small, large = seconds_to_plan(2_000), seconds_to_plan(20_000)
    assert large < 1.0
    assert large < 30 * small

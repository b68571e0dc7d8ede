"""The way to a GPU, against a stand-in for libcuda whose device memory is memory of this machine: no GPU takes part.

What needs the stand-in runs in processes of its own, where LD_LIBRARY_PATH leads the loader to it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.fake_cuda import StandInMemory, Submit, fake_cuda, processes, same

from stoker_checkpoint import _native
from stoker_checkpoint.device_ring import DeviceCheckpoint, open_ring, ordinal_of, spans_of
from stoker_checkpoint.header import DTYPE_BITS, TensorRef
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan, plan_reads
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import CorruptCheckpoint, InvalidMessage, InvalidRequest, LoadCancelled, NativeUnavailable

BOUND_S = 30.0
MIB = 2**20


class Producer:
    """A pool, a load of a whole checkpoint (or of `names`), and the ring it is fed into.

    hold: nothing becomes ready before it is published.
    """

    def __init__(
        self, directory: Path, *, slots: int, names: list[str] | None = None, window: int = 0, hold: bool = False
    ) -> None:
        self.directory = directory
        self.manifest = open_checkpoint(directory)
        self.plan = plan_reads(self.manifest, names)
        self.positions = len(self.plan.positions)
        self.pool = _native.Pool(self.positions, huge="none", lock=False, fault_threads=0)
        self.chunks = self.pool.allocate(window or self.positions) or []
        self.reader = _native.Reader(self.pool, "threads", depth=2, block_bytes=4 * MIB)
        self.load = self.reader.start(
            [(str(directory / shard.name), shard.size_bytes, shard.mtime_ns) for shard in self.manifest.shards],
            self.plan.extents,
            [self.chunks[position % len(self.chunks)] for position in range(self.positions)],
            window=window,
            hold=hold,
        )
        self.ring = _native.DeviceRing(0, slots)
        self.feeder = _native.Feeder(self.ring, self.load.board, self.pool, spans_of(self.plan))

    def publish(self, count: int) -> None:
        for _ in range(count):
            position = self.load.next_read(BOUND_S)
            assert position is not None
            self.load.publish(position)

    def consumer(self, memory: StandInMemory, alive: Callable[[], bool] | None = None) -> DeviceCheckpoint:
        view = open_ring(self.ring.fileno(), self.feeder.board_fd, 0)
        return DeviceCheckpoint(self.manifest, self.plan, view, memory, self.directory, alive=alive)

    def close(self) -> None:
        """What the agent does once a lease ends: every chunk is free again, whatever the consumer did."""
        self.feeder.cancel()
        assert self.feeder.join(BOUND_S)
        self.load.cancel()
        assert self.load.join(BOUND_S)
        self.pool.free(self.chunks)
        assert self.pool.chunks_free == self.pool.chunks_total
        self.reader.close()
        self.pool.close()
        del self.feeder, self.ring


@contextmanager
def producing(directory: Path, **options: Any) -> Iterator[Producer]:
    producer = Producer(directory, **options)
    try:
        yield producer
    finally:
        producer.close()


def consume(
    checkpoint: DeviceCheckpoint, memory: StandInMemory, keep: Callable[[], bool]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors that were kept, copies of all that the stream made)."""
    kept, copies = {}, {}
    for name, tensor in checkpoint.tensors():
        assert tensor.data_ptr() % tensor.element_size() == 0
        copies[name] = torch.empty_like(tensor)
        memory.copy(copies[name], tensor)
        if keep():
            kept[name] = tensor
        del tensor
    memory.mark().synchronize()
    return kept, copies


def fits_a_slot(plan: ReadPlan, tensor: TensorRef) -> bool:
    offset, width = plan.offsets[tensor.name], DTYPE_BITS[tensor.dtype] // 8
    return 0 < tensor.size_bytes <= CHUNK_BYTES - offset % CHUNK_BYTES and offset % width == 0


def write_checkpoint(directory: Path, shards: list[list[tuple[str, list[int], int]]]) -> Path:
    """Shards of (dtype, shape, bytes of an element), filled with noise. Tensors are called by shard and number."""
    directory.mkdir()
    noise = random.Random(5)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        header, data = {}, bytearray()
        for place, (dtype, shape, width) in enumerate(tensors):
            size = width
            for dimension in shape:
                size *= dimension
            name, shard = f"{number}.{place}", f"model-{number}.safetensors"
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
            data += noise.randbytes(size)
            index[name] = shard
        text = json.dumps(header).encode()
        (directory / f"model-{number}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors larger than a ring of two slots, many in one slot, misaligned, empty, scalar."""
    large = ("BF16", [5 * MIB, 4], 2)  # 40 MiB
    small = [("F32", [128, 64], 4), ("U8", [3], 1), ("BF16", [0, 8], 2), ("I64", [], 8), ("F8_E4M3", [1000, 3], 1)] * 8
    medium = [("F16", [2 * MIB], 2)] * 4
    return write_checkpoint(tmp_path_factory.mktemp("ring") / "model", [[*small, *medium, large], [*small, *medium]])


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Submit]]:
    with processes(tmp_path_factory.mktemp("driver")) as make:
        yield make


@pytest.fixture(scope="module")
def run(new_process: Callable[[], Submit]) -> Callable[..., Any]:
    """Runs a function in one such process."""
    submit = new_process()
    return lambda function, *arguments: submit(function, *arguments).result(BOUND_S * 2)


# Functions called by_… run in such a process.


def by_slots_and_keeping(directory: Path, slots: int, kept_share: float) -> None:
    noise, memory = random.Random(slots), StandInMemory(slots, luck=0 if slots == 2 else 0.3)
    with producing(directory, slots=slots) as producer:
        checkpoint = producer.consumer(memory)
        kept, copies = consume(checkpoint, memory, lambda: noise.random() < kept_share)
        expected = read_reference(producer.manifest, directory)
        assert producer.feeder.state == _native.DONE
    assert list(copies) == list(expected)
    assert all(same(copies[name], expected[name]) for name in expected)
    del checkpoint
    # The pool, the ring and its feeder are gone, and these are not.
    assert all(same(kept[name], expected[name]) for name in kept)
    assert bool(memory.lent) == (slots > 2)
    if kept_share == 0 and slots > 2:
        assert len(memory.lent) == sum(fits_a_slot(producer.plan, tensor) for tensor in producer.manifest.tensors)
    if kept_share == 1:
        assert len({address // CHUNK_BYTES for address in memory.lent}) <= slots - 2
    del kept
    assert fake_cuda().fake_cuda_live() == 0


@pytest.mark.parametrize("slots", [2, 3, 8])
@pytest.mark.parametrize("kept_share", [0.0, 0.4, 1.0])
def test_every_tensor_is_what_the_oracle_reads_however_many_are_kept(
    run: Callable[..., Any], directory: Path, slots: int, kept_share: float
) -> None:
    run(by_slots_and_keeping, directory, slots, kept_share)


def by_names(directory: Path) -> None:
    memory, names = StandInMemory(), ["0.1", "0.5", "0.44", "1.0", "1.43"]
    with producing(directory, slots=3, names=names) as producer:
        _, copies = consume(producer.consumer(memory), memory, lambda: False)
        expected = read_reference(producer.manifest, directory, names)
    assert copies.keys() == expected.keys()
    assert all(same(copies[name], expected[name]) for name in expected)


def test_a_part_of_a_checkpoint_arrives(run: Callable[..., Any], directory: Path) -> None:
    run(by_names, directory)


def by_window(directory: Path) -> None:
    memory = StandInMemory()
    with producing(directory, slots=3, window=2) as producer:
        _, copies = consume(producer.consumer(memory), memory, lambda: False)
        expected = read_reference(producer.manifest, directory)
    assert all(same(copies[name], expected[name]) for name in expected)


def test_a_load_through_a_window_of_the_pool_arrives(run: Callable[..., Any], directory: Path) -> None:
    run(by_window, directory)


def by_failure(directory: Path) -> None:
    memory, seen = StandInMemory(), []
    with producing(directory, slots=8, hold=True) as producer:
        expected = read_reference(producer.manifest, directory)

        def use_all() -> None:
            for name, tensor in producer.consumer(memory).tensors():
                copy = torch.empty_like(tensor)
                memory.copy(copy, tensor)
                memory.mark().synchronize()
                assert same(copy, expected[name])
                seen.append(name)

        producer.publish(2)  # in the order of the files, as what is read first is
        producer.load.fail(_native.MISMATCH, 1, CHUNK_BYTES, 0)
        with pytest.raises(CorruptCheckpoint, match=r"model-1\.safetensors.*digest"):
            use_all()
    assert 1 < len(seen) < len(expected)
    assert seen == list(expected)[: len(seen)]


def test_a_load_that_fails_in_the_middle_is_a_typed_error_after_what_was_ready(
    run: Callable[..., Any], directory: Path
) -> None:
    run(by_failure, directory)


def by_every_end(directory: Path) -> None:
    with producing(directory, slots=3, hold=True) as producer:
        with pytest.raises(LoadCancelled):
            next(producer.consumer(StandInMemory(), alive=lambda: False).tensors())
        producer.load.cancel()
        with pytest.raises(LoadCancelled):
            next(producer.consumer(StandInMemory()).tensors())
    with producing(directory, slots=3, hold=True) as producer:
        producer.feeder.cancel()
        with pytest.raises(LoadCancelled):
            next(producer.consumer(StandInMemory()).tensors())
    with producing(directory, slots=3, hold=True) as producer:
        fake_cuda().fake_cuda_fail(b"cuMemcpyHtoDAsync", 0, 700)
        producer.publish(producer.positions)
        with pytest.raises(NativeUnavailable, match="700"):
            next(producer.consumer(StandInMemory()).tensors())
        fake_cuda().fake_cuda_fail(None, 0, 0)


def test_whatever_ends_a_load_early_is_a_typed_error(run: Callable[..., Any], directory: Path) -> None:
    run(by_every_end, directory)


def by_misuse(directory: Path) -> None:
    with producing(directory, slots=3) as producer:
        ring_fd, board_fd = producer.ring.fileno(), producer.feeder.board_fd
        for fds in [(ring_fd, ring_fd), (ring_fd, producer.load.board.fileno()), (ring_fd, -1)]:
            with pytest.raises(InvalidMessage):
                open_ring(*fds, 0)
        with pytest.raises(InvalidMessage, match="another device"):
            open_ring(ring_fd, board_fd, 1)
        with pytest.raises(NativeUnavailable, match="cuMemImportFromShareableHandle"):
            open_ring(-1, board_fd, 0)
        other = plan_reads(producer.manifest, ["0.1"])
        with pytest.raises(InvalidMessage, match="positions"):
            DeviceCheckpoint(producer.manifest, other, open_ring(ring_fd, board_fd, 0), StandInMemory(), directory)
        checkpoint = producer.consumer(StandInMemory())
        next(checkpoint.tensors())
        with pytest.raises(InvalidRequest):
            next(checkpoint.tensors())
    with pytest.raises(RuntimeError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        _native.DeviceRing(9, 3)


def test_a_wrong_handle_is_an_error_to_its_caller(run: Callable[..., Any], directory: Path) -> None:
    run(by_misuse, directory)


def serve(directory: Path, path: Path) -> int:
    """Feed a ring to whoever connects, until the connection ends. Positions that were fed."""
    with socket.socket(socket.AF_UNIX) as listener, producing(directory, slots=3) as producer:
        listener.bind(str(path.with_suffix(".new")))
        listener.listen()
        path.with_suffix(".new").rename(path)  # there only once it can be connected to
        listener.settimeout(BOUND_S)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(BOUND_S)
            socket.send_fds(connection, [b"ring"], [producer.ring.fileno(), producer.feeder.board_fd])
            assert connection.recv(1) == b""
        return producer.feeder.filled


@contextmanager
def connected(directory: Path, path: Path, memory: StandInMemory) -> Iterator[DeviceCheckpoint]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(BOUND_S)
        connection.connect(str(path))
        _, fds, _, _ = socket.recv_fds(connection, 4, 2)
        manifest = open_checkpoint(directory)
        view = open_ring(fds[0], fds[1], 0)
        for fd in fds:
            os.close(fd)
        yield DeviceCheckpoint(manifest, plan_reads(manifest), view, memory, directory)


def use_from_elsewhere(directory: Path, path: Path) -> bool:
    memory = StandInMemory()
    with connected(directory, path, memory) as checkpoint:
        kept, copies = consume(checkpoint, memory, lambda: True)
    expected = read_reference(open_checkpoint(directory), directory)
    return bool(memory.lent) and all(
        same(copies[name], expected[name]) and same(kept[name], expected[name]) for name in expected
    )


def die_in_the_middle(directory: Path, path: Path) -> None:
    with connected(directory, path, StandInMemory()) as checkpoint:
        next(checkpoint.tensors())
        os.kill(os.getpid(), signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_consumer_in_another_process_gets_every_tensor(
    new_process: Callable[[], Submit], directory: Path, tmp_path: Path
) -> None:
    served = new_process()(serve, directory, tmp_path / "socket")
    until((tmp_path / "socket").exists)
    assert new_process()(use_from_elsewhere, directory, tmp_path / "socket").result(BOUND_S)
    assert served.result(BOUND_S) == len(plan_reads(open_checkpoint(directory)).positions)


def test_a_killed_consumer_leaves_every_chunk_free(
    new_process: Callable[[], Submit], directory: Path, tmp_path: Path
) -> None:
    served = new_process()(serve, directory, tmp_path / "socket")
    until((tmp_path / "socket").exists)
    with pytest.raises(BrokenProcessPool):
        new_process()(die_in_the_middle, directory, tmp_path / "socket").result(BOUND_S)
    assert served.result(BOUND_S) < len(plan_reads(open_checkpoint(directory)).positions)


def test_a_device_is_found_by_the_name_that_nvml_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_devices", lambda: [bytes(16), bytes(range(0xF0, 0x100))])
    assert ordinal_of("GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff") == 1
    with pytest.raises(NativeUnavailable, match="GPU-elsewhere"):
        ordinal_of("GPU-elsewhere")


def test_without_a_driver_no_device_is_found_and_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> list[bytes]:
        raise RuntimeError("no CUDA driver: libcuda.so.1")

    monkeypatch.setattr(_native, "cuda_devices", refused)
    with pytest.raises(NativeUnavailable, match="no CUDA driver"):
        ordinal_of("GPU-1")


def test_spans_hold_all_that_is_read_of_a_chunk() -> None:
    plan = ReadPlan(
        shards=("a",),
        positions=((0, 0), (0, 2)),
        extents=((0, 0, 4096, 4096), (0, 0, 20480, 8192), (1, 0, 2 * CHUNK_BYTES, CHUNK_BYTES)),
        offsets={},
        read_bytes=0,
    )
    assert spans_of(plan) == [(4096, 24576), (0, CHUNK_BYTES)]

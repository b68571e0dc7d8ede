"""The pool and its readings: who gets chunks, and that they come back exactly once."""

import gc
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.native.conftest import ENGINES, POOL_CHUNKS
from tests.support.checkpoints import assert_same, plain_checkpoint

from stoker_checkpoint import _native, plan
from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.load import attach, load
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.probe import ProbeResult, probe_readers
from stoker_checkpoint.reading import Reading
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import (
    InvalidMessage,
    InvalidRequest,
    InvalidSettings,
    LoadCancelled,
    NativeUnavailable,
    PoolExhausted,
    ReadFailed,
)


def test_both_sides_mean_the_same_chunks() -> None:
    assert (_native.CHUNK_BYTES, _native.ALIGN_BYTES) == (plan.CHUNK_BYTES, plan.ALIGN_BYTES)


def test_a_pool_smaller_than_a_chunk_is_refused() -> None:
    with pytest.raises(InvalidSettings):
        Pool(CHUNK_BYTES - 1)


def test_a_pool_becomes_warm_and_says_how_it_lies(pool: Pool) -> None:
    assert pool.wait_warm(60)
    status = pool.status()
    assert status.total_bytes == status.free_bytes == status.warm_bytes == POOL_CHUNKS * CHUNK_BYTES
    assert status.locked_bytes == 0
    assert status.pages == "small"
    assert status.reader in ENGINES
    assert status.reader_reason == ""
    assert status.direct is None


def test_status_follows_the_readings(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pool.read(plan_reads(manifest), manifest, model) as reading:
        assert reading.wait_blocking(30)
        status = pool.status()
        assert status.free_bytes == (POOL_CHUNKS - 3) * CHUNK_BYTES
        assert status.direct is reading.direct
        assert status.registered_buffers is not None
    assert pool.status().direct is None
    assert pool.status().free_bytes == status.total_bytes


def test_a_load_that_does_not_fit_is_refused_and_takes_nothing(pool: Pool, tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "large", mib=100)
    plain_checkpoint(tmp_path / "small", mib=10)
    large, small = open_checkpoint(tmp_path / "large"), open_checkpoint(tmp_path / "small")
    with load(large, pool, tmp_path / "large"):
        with pytest.raises(PoolExhausted) as caught:
            load(large, pool, tmp_path / "large")
        assert (caught.value.need_bytes, caught.value.free_bytes) == (7 * CHUNK_BYTES, CHUNK_BYTES)
        with load(small, pool, tmp_path / "small") as loaded:
            assert_same(dict(loaded.tensors()), read_reference(small, tmp_path / "small"))


def test_a_window_as_large_as_the_load_is_none(pool: Pool, model: Path) -> None:
    with load(open_checkpoint(model), pool, model, window_bytes=3 * CHUNK_BYTES) as loaded:
        loaded.tensor("0.0")


def test_a_plan_of_another_checkpoint_is_refused(pool: Pool, tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "one")
    plain_checkpoint(tmp_path / "two", shards=2)
    plain_checkpoint(tmp_path / "less", mib=20)
    one, two, less = (open_checkpoint(tmp_path / name) for name in ("one", "two", "less"))
    with pytest.raises(InvalidRequest, match="no shard"):
        pool.read(plan_reads(two), one, tmp_path / "one")
    with pytest.raises(InvalidRequest, match="does not fit"):
        pool.read(plan_reads(one), less, tmp_path / "less")


def test_verification_needs_digests_and_whole_chunks(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pytest.raises(InvalidRequest, match="digests are not known"):
        load(manifest, pool, model, verify=True)
    manifest = digest_manifest(manifest, model)
    with pytest.raises(InvalidRequest, match="whole chunks"):
        pool.read(plan_reads(manifest, ["0.7"]), manifest, model, verify=True)


def test_chunks_are_freed_once_however_often_and_wherever_it_is_closed(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    for _ in range(10):
        reading = pool.read(plan_reads(manifest), manifest, model)
        with ThreadPoolExecutor(4) as threads:
            for closing in [threads.submit(reading.close) for _ in range(4)]:
                closing.result(30)
        assert reading.chunks == ()
        assert pool.native.chunks_free == POOL_CHUNKS


@pytest.mark.parametrize("verify", [False, True])
def test_a_load_that_is_stuck_can_be_cancelled_and_closed(pool: Pool, model: Path, verify: bool) -> None:
    manifest = digest_manifest(open_checkpoint(model), model)
    with pool.read(plan_reads(manifest), manifest, model, window_chunks=1, verify=verify) as reading:
        assert not reading.wait_blocking(0.05)
        reading.cancel()
        with pytest.raises(LoadCancelled):
            reading.wait_blocking(30)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify")]


def test_cancelling_at_any_point_gives_all_chunks_back_and_the_next_load_is_right(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    expected = read_reference(manifest, model)
    for taken in range(9):
        with load(manifest, pool, model, window_bytes=CHUNK_BYTES if taken % 2 else 0) as loaded:
            for _, _ in zip(range(taken), loaded.tensors(), strict=False):
                pass
        assert pool.native.chunks_free == POOL_CHUNKS
    with load(manifest, pool, model) as loaded:
        assert_same(dict(loaded.tensors()), expected)


def test_loads_leave_no_descriptor_open(pool: Pool, model: Path) -> None:
    manifest = digest_manifest(open_checkpoint(model), model)

    def open_after_one() -> int:
        with load(manifest, pool, model, verify=True) as loaded:
            loaded.touch()
        del loaded
        gc.collect()  # earlier tests' garbage, too
        return len(os.listdir("/proc/self/fd"))

    first = open_after_one()
    # The reader may hold its last load for a while, and so a board and an eventfd.
    assert max(open_after_one() for _ in range(10)) <= first + 2


def test_a_pool_that_closes_ends_its_readings(model: Path) -> None:
    manifest = open_checkpoint(model)
    pool = Pool(4 * CHUNK_BYTES, huge="none", lock=False)
    reading = pool.read(plan_reads(manifest), manifest, model, window_chunks=1)
    pool.close()
    pool.close()
    with pytest.raises(LoadCancelled):
        reading.wait_blocking(30)
    reading.close()
    with pytest.raises(ValueError, match="closed"):
        pool.read(plan_reads(manifest), manifest, model)


def test_a_consumer_outlives_the_pool(model: Path) -> None:
    manifest = open_checkpoint(model)
    plan_ = plan_reads(manifest)
    with Pool(4 * CHUNK_BYTES, huge="none", lock=False) as pool:
        reading = pool.read(plan_, manifest, model)
        loaded = attach(manifest, plan_, reading.pool_fd, reading.board_fd, directory=model)
        assert reading.wait_blocking(30)
    with loaded:
        assert_same(dict(loaded.tensors()), read_reference(manifest, model))


def test_an_adopted_pool_keeps_what_is_used_and_gives_out_the_rest(model: Path) -> None:
    manifest = open_checkpoint(model)
    plan_ = plan_reads(manifest)
    expected = read_reference(manifest, model)
    first = Pool(POOL_CHUNKS * CHUNK_BYTES, huge="none", lock=False)
    reading = first.read(plan_, manifest, model)
    assert reading.wait_blocking(30)
    used = reading.chunks
    with Pool.adopt(first.native.fileno(), used, lock=False) as second:
        with attach(manifest, plan_, second.reader_fd, reading.board_fd, directory=model) as loaded:
            first.close()
            assert second.native.chunks_free == POOL_CHUNKS - len(used)
            with load(manifest, second, model) as other:
                assert_same(dict(other.tensors()), expected)
            assert_same(dict(loaded.tensors()), expected)
        second.native.free(used)
        assert second.native.chunks_free == POOL_CHUNKS


def test_what_is_no_pool_cannot_be_adopted(pool: Pool, model: Path) -> None:
    with (model / "model.safetensors").open() as file, pytest.raises(InvalidMessage):
        Pool.adopt(file.fileno(), [])
    with pytest.raises(InvalidMessage):
        Pool.adopt(pool.native.fileno(), [POOL_CHUNKS])
    with pytest.raises(InvalidMessage):
        Pool.adopt(-1, [])


def test_a_load_whose_verifiers_cannot_start_gives_its_chunks_back(
    pool: Pool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = digest_manifest(open_checkpoint(model), model)
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refuse_the_second(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(NativeUnavailable, match="new thread"):
        pool.read(plan_reads(manifest), manifest, model, verify=True)
    assert pool.native.chunks_free == POOL_CHUNKS
    started[0].join(30)
    assert not started[0].is_alive()


def test_a_load_that_finds_no_descriptor_left_is_refused_and_takes_nothing(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with load(manifest, pool, model) as loaded:  # the engine has what it needs from here on
        loaded.touch()
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(NativeUnavailable, match="Too many open files"):
            pool.read(plan_reads(manifest), manifest, model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_status_can_be_asked_while_another_thread_begins_to_read(
    pool: Pool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_checkpoint(model)
    plan_ = plan_reads(manifest, ["0.0"])
    with ExitStack() as stack, ThreadPoolExecutor(1) as other:

        def begin() -> None:
            stack.enter_context(pool.read(plan_, manifest, model))

        def direct_while_one_begins(reading: Reading) -> bool:
            other.submit(begin).result(30)
            return True

        begin()
        monkeypatch.setattr(Reading, "direct", property(direct_while_one_begins))
        assert pool.status().direct


def test_other_threads_go_on_while_a_view_is_unmapped(pool: Pool) -> None:
    chunks = pool.native.allocate(POOL_CHUNKS)
    assert chunks is not None
    view = _native.View(pool.reader_fd, chunks)
    view.touch(0, view.size_bytes)
    pool.native.free(chunks)
    turns, done = 0, threading.Event()

    def go_on() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody else runs but when the interpreter is let go of
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(go_on)
            before = turns
            del view
            after = turns
            done.set()
    finally:
        sys.setswitchinterval(interval)
    assert after > before


def test_both_engines_are_probed_and_the_faster_one_is_used(model: Path) -> None:
    result = probe_readers([model / "model.safetensors"], rounds=2, chunks=2)
    assert result.bytes_per_s.keys() | result.missing.keys() == set(ENGINES)
    assert not result.bytes_per_s.keys() & result.missing.keys()
    assert result.bytes_per_s[result.faster] == max(result.bytes_per_s.values())
    manifest = open_checkpoint(model)
    with Pool(4 * CHUNK_BYTES, huge="none", lock=False) as pool:
        for faster in ENGINES:
            if faster in result.missing:
                continue
            pool.use(ProbeResult(faster=faster, bytes_per_s={}, missing={}, direct=True))
            assert pool.status().reader == faster
            with load(manifest, pool, model) as loaded:
                loaded.touch()
    with Pool(CHUNK_BYTES, huge="none", lock=False, reader="threads") as pool:
        pool.use(ProbeResult(faster="io_uring", bytes_per_s={}, missing={}, direct=True))
        assert pool.status().reader == "threads"


def test_probing_what_is_not_there_fails_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ReadFailed, match="nothing"):
        probe_readers([tmp_path / "nothing"])
    (tmp_path / "empty").touch()
    with pytest.raises(ReadFailed, match="empty"):
        probe_readers([tmp_path / "empty"])

"""A load shared by processes: read once, and no consumer's death or mistake is anybody else's."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from tests.native.conftest import POOL_CHUNKS
from tests.support.checkpoints import assert_same

from stoker_checkpoint.load import attach
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reading import Reading
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import InvalidMessage, LoadCancelled

CONSUMER = r"""
import sys
from pathlib import Path
from stoker_checkpoint.load import attach
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import plan_reads

directory, pool_fd, board_fd, stop_after = Path(sys.argv[1]), *map(int, sys.argv[2:])
manifest = open_checkpoint(directory)
plan = plan_reads(manifest)
print("begun", flush=True)
with attach(manifest, plan, pool_fd, board_fd, directory=directory) as loaded:
    if stop_after < 0:
        loaded.touch()
        assert "torch" not in sys.modules
        print("touched", flush=True)
        sys.exit()
    from stoker_checkpoint.reference import read_reference
    from tests.support.checkpoints import same
    expected = read_reference(manifest, directory)
    for number, (name, tensor) in enumerate(loaded.tensors()):
        assert same(tensor, expected[name])
        tensor.zero_()
        if number == stop_after:
            print("stopped", flush=True)
            sys.stdin.read()
print("same", flush=True)
"""
NEVER = 1_000_000


def consumer(model: Path, reading: Reading, *, stop_after: int = NEVER) -> subprocess.Popen[str]:
    fds = (reading.pool_fd, reading.board_fd)
    return subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(model), *map(str, fds), str(stop_after)],
        pass_fds=fds,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.split()


def test_two_processes_use_one_read(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pool.read(plan_reads(manifest), manifest, model) as reading:
        processes = [consumer(model, reading) for _ in range(2)]
        assert [said(process) for process in processes] == [["begun", "same"]] * 2
        assert reading.progress() == (manifest.file_bytes, manifest.file_bytes)
        assert pool.native.chunks_free == POOL_CHUNKS - 3


def test_a_consumer_that_touches_needs_no_torch(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pool.read(plan_reads(manifest), manifest, model) as reading:
        assert said(consumer(model, reading, stop_after=-1)) == ["begun", "touched"]


@pytest.mark.parametrize("window", [0, 2])
def test_of_a_consumer_killed_in_mid_load_every_chunk_comes_back(pool: Pool, model: Path, window: int) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    with pool.read(plan, manifest, model, window_chunks=window) as reading:
        process = consumer(model, reading, stop_after=1)
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["begun", "stopped"]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        if not window:  # others go on as if nothing had been
            assert reading.wait_blocking(30)
            with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model) as loaded:
                assert_same(dict(loaded.tensors()), read_reference(manifest, model))
    assert pool.native.chunks_free == POOL_CHUNKS


def test_a_consumer_whose_reader_is_gone_does_not_wait_for_ever(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    with pool.read(plan, manifest, model, window_chunks=1) as reading:
        asked = threading.Event()

        def gone() -> bool:
            asked.set()
            return False

        with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model, alive=gone) as loaded:
            with pytest.raises(LoadCancelled, match="gone"):
                loaded.wait(30)
            assert asked.is_set()


def test_what_is_ready_can_be_taken_though_the_reader_is_gone(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    with pool.read(plan, manifest, model) as reading:
        assert reading.wait_blocking(30)
        with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model, alive=lambda: False) as loaded:
            assert_same(dict(loaded.tensors()), read_reference(manifest, model))


def closed_descriptor() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


HANDLES: dict[str, Callable[[Reading, int], Sequence[int]]] = {
    "no pool": lambda reading, null: (null, reading.board_fd),
    "no board": lambda reading, null: (reading.pool_fd, null),
    "swapped": lambda reading, null: (reading.board_fd, reading.pool_fd),
    "closed pool": lambda reading, null: (closed_descriptor(), reading.board_fd),
    "closed board": lambda reading, null: (reading.pool_fd, closed_descriptor()),
    "negative": lambda reading, null: (-1, -1),
}


@pytest.mark.parametrize("handle", HANDLES)
def test_a_bad_handle_is_an_error_to_its_caller_alone(pool: Pool, model: Path, handle: str) -> None:
    manifest = open_checkpoint(model)
    plan = plan_reads(manifest)
    with pool.read(plan, manifest, model) as reading, open(os.devnull) as null:
        pool_fd, board_fd = HANDLES[handle](reading, null.fileno())
        with pytest.raises(InvalidMessage):
            attach(manifest, plan, pool_fd, board_fd, directory=model)
        with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model) as loaded:
            assert_same(dict(loaded.tensors()), read_reference(manifest, model))


def test_a_load_of_another_plan_is_refused(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    with pool.read(plan_reads(manifest), manifest, model) as reading:
        fds = reading.pool_fd, reading.board_fd
        with pytest.raises(InvalidMessage, match="3 positions, the plan 1"):
            attach(manifest, plan_reads(manifest, ["0.0"]), *fds, directory=model)
        plan = plan_reads(manifest)
        for offset in (-5, 3 * CHUNK_BYTES - 5):
            outside = msgspec.structs.replace(plan, offsets=plan.offsets | {"0.7": offset})
            with pytest.raises(InvalidMessage, match=r"'0\.7' outside"):
                attach(manifest, outside, *fds, directory=model)

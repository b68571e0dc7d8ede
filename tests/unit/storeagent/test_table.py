from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.descriptors import descriptors_before, descriptors_open

from stoker_core.errors import InvalidMessage, StorageFailed
from stoker_storeagent.table import SLOT_BYTES, PoolTable, ResidentRecord, Snapshot

U32_MAX = 2**32 - 1
EMPTY = Snapshot(residents=(), pool_chunks=0)


def snapshot(count: int, *, holders: tuple[str, ...] = ("i-1",)) -> Snapshot:
    record = ResidentRecord(model_id="m" * count, chunks=tuple(range(count)), complete=True, holders=holders)
    return Snapshot(residents=(record,), pool_chunks=count)


records = st.builds(
    ResidentRecord,
    model_id=st.text(max_size=20),
    chunks=st.lists(st.integers(0, U32_MAX), max_size=30).map(tuple),
    complete=st.booleans(),
    holders=st.lists(st.text(max_size=10), max_size=3).map(tuple),
)
snapshots = st.builds(
    Snapshot,
    residents=st.lists(records, max_size=4).map(tuple),
    pool_chunks=st.integers(0, U32_MAX),
    format=st.integers(0, 9),
)


@pytest.fixture
def table() -> Iterator[PoolTable]:
    with closing(PoolTable(slot_bytes=64 * 1024)) as made:
        yield made


@given(written=st.lists(snapshots, max_size=5))
def test_what_was_written_last_is_read_here_and_by_who_adopts_it(written: list[Snapshot]):
    with closing(PoolTable()) as table:
        for each in written:
            table.write(each)
            assert table.read() == each
        with closing(PoolTable.adopt(table.fileno())) as adopted:
            assert adopted.read() == (written[-1] if written else None)


def test_who_adopts_goes_on_where_the_last_one_was(table: PoolTable):
    for count in range(1, 4):
        table.write(snapshot(count))
    for count in range(4, 8):
        adopted = PoolTable.adopt(table.fileno())
        assert adopted.read() == snapshot(count - 1)
        adopted.write(snapshot(count))
        adopted.close()
        assert table.read() == snapshot(count)


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    """Of what is written next only so many bytes are."""
    pwrite = os.pwrite

    def cut(fd: int, data: memoryview, offset: int) -> int:
        nonlocal size_bytes
        written = pwrite(fd, data[:size_bytes], offset)
        size_bytes -= written
        if not size_bytes:
            raise Killed
        return written

    monkeypatch.setattr(os, "pwrite", cut)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_killed_at_any_byte_of_a_write_it_reads_as_before_or_after(before: int, monkeypatch: pytest.MonkeyPatch):
    """Larger, equal and smaller than what lay in the slot."""
    for size in (20, 7, 1):
        for cut in range(1, 200):
            with closing(PoolTable(slot_bytes=4096)) as table:
                for _ in range(before):
                    table.write(snapshot(7))
                last, new = table.read(), snapshot(size, holders=("i-2",))
                with monkeypatch.context() as patched:
                    kill_after(patched, cut)
                    try:
                        table.write(new)
                    except Killed:
                        finished = False
                    else:
                        finished = True
                with closing(PoolTable.adopt(table.fileno())) as successor:
                    assert successor.read() in ((new,) if finished else (last, new))
                    successor.write(EMPTY)
                    assert successor.read() == EMPTY
                if finished:
                    break


@settings(max_examples=50)
@given(data=st.data(), written=st.lists(snapshots, min_size=1, max_size=6))
def test_kills_amid_several_writes_never_lose_the_last_one(data: st.DataObject, written: list[Snapshot]):
    with closing(PoolTable()) as table, pytest.MonkeyPatch.context() as monkeypatch:
        held: Snapshot | None = None
        for each in written:
            successor = PoolTable.adopt(table.fileno())
            with monkeypatch.context() as patched, closing(successor):
                cut = data.draw(st.none() | st.integers(1, 100))
                if cut is not None:
                    kill_after(patched, cut)
                try:
                    successor.write(each)
                    held = each
                except Killed:
                    pass
            assert table.read() in (held, each)
            held = table.read()


def test_a_process_killed_while_it_writes_leaves_a_snapshot_that_is_whole(table: PoolTable):
    code = (
        "import sys; from stoker_storeagent.table import *\n"
        "table = PoolTable.adopt(int(sys.argv[1]))\n"
        "for n in range(1, 10**9):\n"
        "    chunks = tuple(range(n, n + 3000))\n"
        "    table.write(Snapshot(residents=(ResidentRecord(model_id=str(n), chunks=chunks, complete=True),), pool_chunks=n))\n"
        "    n == 3 and print(flush=True)\n"
    )
    fd = table.fileno()
    with subprocess.Popen([sys.executable, "-c", code, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    found = PoolTable.adopt(fd).read()
    assert found is not None
    (resident,) = found.residents
    assert found.pool_chunks >= 3
    assert resident.model_id == str(found.pool_chunks)
    assert resident.chunks == tuple(range(found.pool_chunks, found.pool_chunks + 3000))


def test_a_table_of_a_large_pool_fits():
    with closing(PoolTable()) as table:
        residents = tuple(
            ResidentRecord(model_id=f"m-{n}", chunks=tuple(range(1000)), complete=True, holders=("i" * 30,) * 10)
            for n in range(256)
        )
        table.write(Snapshot(residents=residents, pool_chunks=256_000))
        assert table.read().residents == residents  # type: ignore[union-attr]


def test_a_snapshot_over_the_limit_is_refused_and_the_last_one_stays(table: PoolTable):
    table.write(snapshot(1))
    chunks = tuple(range(SLOT_BYTES // 4))
    with pytest.raises(StorageFailed, match="more than its"):
        table.write(
            Snapshot(residents=(ResidentRecord(model_id="m", chunks=chunks, complete=True),), pool_chunks=len(chunks))
        )
    assert table.read() == snapshot(1)


def test_without_memory_a_write_fails_and_the_last_snapshot_stays(table: PoolTable, monkeypatch: pytest.MonkeyPatch):
    table.write(snapshot(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StorageFailed, match="No space"):
            table.write(snapshot(2))
    assert table.read() == snapshot(1)
    table.write(snapshot(3))
    assert table.read() == snapshot(3)


def test_what_is_no_table_is_not_adopted():
    with closing(PoolTable()) as table:
        unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, os.fstat(table.fileno()).st_size)
        os.pwrite(unsealed, os.pread(table.fileno(), 64, 0), 0)
        sealed = os.memfd_create("y", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        plain = os.open(os.devnull, os.O_RDONLY)
        for fd in (unsealed, sealed, plain):
            with pytest.raises(InvalidMessage, match="no table"):
                PoolTable.adopt(fd)
        for fd in (unsealed, sealed, plain):
            os.close(fd)
        os.pwrite(table.fileno(), b"\x09", 8)
        with pytest.raises(InvalidMessage, match="format 9"):
            PoolTable.adopt(table.fileno())


def test_nobody_else_can_open_it_and_no_descriptor_stays():
    before = descriptors_before()
    table = PoolTable()
    assert os.fstat(table.fileno()).st_mode & 0o777 == 0o600
    adopted = PoolTable.adopt(table.fileno())
    for each in (table, adopted):
        each.close()
        each.close()
    assert descriptors_open() == before

"""Chunks on their way to the disk."""

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.services import eventually
from tests.support.ssd_rig import FILES, SIZES, a_checkpoint, a_directory, content, digest_of, opened, pool_memory, put

from stoker_checkpoint import _native
from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.writing import Writer
from stoker_core.errors import RefusedCheckpoint, StokerError, StorageFailed, TierFull
from stoker_storeagent.adapters import ssd_start
from stoker_storeagent.adapters.ssd import SsdDirectory

MODEL = "model-1"
Write = Callable[[Writer, int, memoryview, int], Awaitable[int]]
Sync = Callable[[Writer, int], Awaitable[None]]
Done = list[tuple[int, int]]


@pytest.fixture
async def ssd(tmp_path: Path) -> AsyncIterator[SsdDirectory]:
    async with opened(tmp_path) as made:
        await made.keep(a_checkpoint(), FILES)
        yield made


def parts(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root / "parts")) for path in (root / "parts").rglob("*") if path.is_file())


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def short(most: int, times: int, write: Write = Writer.write) -> Write:
    """The first so many write so many bytes at most."""
    cuts = iter(range(times))

    async def cut(self: Writer, fd: int, data: memoryview, offset: int) -> int:
        return await write(self, fd, data[:most] if next(cuts, None) is not None else data, offset)

    return cut


class SlowDisk:
    """What native writers are asked is over for their callers when `go_on` is set. result: what it came to, if not what it did."""

    def __init__(self, patch: pytest.MonkeyPatch, *, result: int | None = None) -> None:
        self.go_on = asyncio.Event()
        self.asked = self.at_once_max = 0
        self._at_once, self._result = 0, result
        for name in ("open", "write", "sync", "rename"):
            patch.setattr(_native.Writer, name, self._counted(getattr(_native.Writer, name)))
        patch.setattr(_native.Writer, "take_done", self._held(_native.Writer.take_done))

    def _counted(self, call: Callable[..., int]) -> Callable[..., int]:
        def ask(writer: _native.Writer, *arguments: object) -> int:
            self.asked += 1
            self._at_once += 1
            self.at_once_max = max(self.at_once_max, self._at_once)
            return call(writer, *arguments)

        return ask

    def _held(self, take: Callable[[_native.Writer], Done]) -> Callable[[_native.Writer], Done]:
        def take_done(writer: _native.Writer) -> Done:
            if not self.go_on.is_set():
                return []
            done = take(writer)
            self._at_once -= len(done)
            return [(ticket, size if self._result is None else self._result) for ticket, size in done]

        return take_done


@pytest.mark.parametrize("size", [1, 4095, 4096, 5000, 8192, 2**20 + 17, CHUNK_BYTES])
@pytest.mark.parametrize("memory", [pool_memory, memoryview])
async def test_a_finished_part_is_a_chunk_with_exactly_its_bytes(
    ssd: SsdDirectory, size: int, memory: Callable[[bytes], memoryview]
) -> None:
    data = content(size)
    part = await ssd.part(MODEL, 0)
    await part.write(memory(data))
    assert part.size_bytes == size
    await part.finish(chunk_digest(data))
    path = ssd.chunk(chunk_digest(data))
    assert path.read_bytes() == data
    assert path.relative_to(ssd.root).parts == ("chunks", path.name[:2], chunk_digest(data).removeprefix("xxh3_128:"))
    assert parts(ssd.root) == ["BOOT"]


async def test_what_is_aligned_goes_past_the_page_cache_and_the_tail_through_it(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[bool, int]] = []

    async def watched(self: Writer, fd: int, data: memoryview, offset: int, write: Write = Writer.write) -> int:
        size = await write(self, fd, data, offset)
        written.append((is_direct(fd), size))
        return size

    monkeypatch.setattr(Writer, "write", watched)
    part = await ssd.part(MODEL, 0)
    try:
        os.close(os.open(ssd.root / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        pytest.skip("the file system of tests knows no O_DIRECT")
    await part.write(pool_memory(content(8192)))
    await part.write(pool_memory(content(5000)))
    await part.write(pool_memory(content(4096)))
    assert written == [(True, 8192), (True, 4096), (False, 904), (False, 4096)]
    part.close()


async def test_an_abandoned_part_goes_on_where_it_ended(tmp_path: Path) -> None:
    data = content(SIZES[2])
    async with opened(tmp_path) as ssd:
        await ssd.keep(a_checkpoint(), FILES)
        part = await ssd.part(MODEL, 2)
        await part.write(pool_memory(data[:8192]))
        part.close()
        part.close()
    async with opened(tmp_path) as ssd:
        part = await ssd.part(MODEL, 2)
        assert part.size_bytes == 8192
        found = memoryview(bytearray(8192))
        await part.read(found)
        assert found == data[:8192]
        await part.write(pool_memory(data[8192:]))
        await part.finish(chunk_digest(data))
        assert ssd.chunk(chunk_digest(data)).read_bytes() == data


async def test_a_discarded_part_is_gone(ssd: SsdDirectory) -> None:
    part = await ssd.part(MODEL, 1)
    await part.write(pool_memory(content(4096)))
    await part.discard()
    assert parts(ssd.root) == ["BOOT"]
    part = await ssd.part(MODEL, 1)
    assert part.size_bytes == 0
    part.close()


async def test_a_chunk_that_is_there_stays_whole_for_who_reads_it_and_no_part_is_left(ssd: SsdDirectory) -> None:
    path = ssd.chunk(await put(ssd, MODEL, 1))
    with path.open("rb") as reading:
        await put(ssd, MODEL, 1)
        assert reading.read() == path.read_bytes() == content(SIZES[1], 1)
    assert parts(ssd.root) == ["BOOT"]


async def test_a_chunk_that_is_there_with_another_size_is_replaced(ssd: SsdDirectory) -> None:
    path = ssd.chunk(await put(ssd, MODEL, 1))
    path.write_bytes(b"short")
    await put(ssd, MODEL, 1)
    assert path.read_bytes() == content(SIZES[1], 1)


async def test_a_chunk_has_no_name_before_its_bytes_are_on_the_disk(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    async def watched(self: Writer, fd: int, sync: Sync = Writer.sync) -> None:
        names.extend((ssd.root / "chunks").rglob("*"))
        assert os.fstat(fd).st_size == SIZES[1]
        await sync(self, fd)
        names.extend((ssd.root / "chunks").rglob("*"))
        names.append("synced")

    monkeypatch.setattr(Writer, "sync", watched)
    assert ssd.chunk(await put(ssd, MODEL, 1)).exists()
    assert names == ["synced"]


@pytest.mark.parametrize(
    "digest", ["", "xxh3_128:", "xxh3_128:" + "A" * 32, "sha256:" + "0" * 32, "xxh3_128:../" + "0" * 29]
)
async def test_what_is_no_digest_becomes_no_path(ssd: SsdDirectory, digest: str) -> None:
    with pytest.raises(RefusedCheckpoint, match="no digest"):
        ssd.chunk(digest)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, TierFull), (errno.EDQUOT, TierFull), (errno.EIO, StorageFailed)]
)
async def test_after_a_failed_write_a_part_has_what_it_had_and_can_go_on(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StokerError]
) -> None:
    data = content(SIZES[2])
    part = await ssd.part(MODEL, 2)
    await part.write(pool_memory(data[:4096]))

    async def refused(self: Writer, fd: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", refused)
        with pytest.raises(error):
            await part.write(pool_memory(data[4096:]))
    assert part.size_bytes == 4096
    await part.write(pool_memory(data[4096:]))
    await part.finish(chunk_digest(data))
    assert ssd.chunk(chunk_digest(data)).read_bytes() == data


@pytest.mark.parametrize("most", [1000, 4096, 4097])
async def test_short_writes_are_gone_on_with(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    data = content(SIZES[2])
    monkeypatch.setattr(Writer, "write", short(most, times=100))
    part = await ssd.part(MODEL, 2)
    await part.write(pool_memory(data))
    await part.finish(chunk_digest(data))
    assert ssd.chunk(chunk_digest(data)).read_bytes() == data


async def test_a_disk_that_takes_nothing_is_a_failure(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Writer, fd: int, data: memoryview, offset: int) -> int:
        return 0

    monkeypatch.setattr(Writer, "write", nothing)
    part = await ssd.part(MODEL, 2)
    with pytest.raises(StorageFailed, match="nothing was written"):
        await part.write(pool_memory(content(4096)))
    part.close()


@pytest.mark.parametrize("at", ["open", "write"])
async def test_a_file_system_without_direct_writes_is_asked_once(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    refused = []

    def refuse() -> None:
        refused.append(at)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async def open_(self: Writer, path: Path, flags: int, opener: Callable[..., Awaitable[int]] = Writer.open) -> int:
        if at == "open" and flags & os.O_DIRECT:
            refuse()
        return await opener(self, path, flags)

    async def write_(self: Writer, fd: int, data: memoryview, offset: int, write: Write = Writer.write) -> int:
        if at == "write" and is_direct(fd):
            refuse()
        return await write(self, fd, data, offset)

    monkeypatch.setattr(Writer, "open", open_)
    monkeypatch.setattr(Writer, "write", write_)
    for position in (0, 1, 2):
        assert ssd.chunk(await put(ssd, MODEL, position)).read_bytes() == content(SIZES[position], position)
    assert len(refused) == 1


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, StorageFailed), (errno.ENOSPC, TierFull)])
async def test_a_part_that_could_not_be_synced_is_not_trusted_again(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StokerError]
) -> None:
    async def refused(self: Writer, fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "sync", refused)
        with pytest.raises(error):
            await put(ssd, MODEL, 1)
    assert parts(ssd.root) == ["BOOT"]
    assert not list((ssd.root / "chunks").rglob("*"))


async def test_nor_is_it_if_who_asked_was_cancelled_meanwhile(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = await ssd.part(MODEL, 1)
    await part.write(pool_memory(content(SIZES[1], 1)))
    disk = SlowDisk(monkeypatch, result=-errno.EIO)
    finishing = asyncio.create_task(part.finish(digest_of(1)))
    await eventually(lambda: disk.asked == 1)
    finishing.cancel()
    disk.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    part.close()
    assert parts(ssd.root) == ["BOOT"]
    assert not list((ssd.root / "chunks").rglob("*"))


async def test_parts_of_another_boot_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "ssd") as ssd:
        await ssd.keep(a_checkpoint(), FILES)
        part = await ssd.part(MODEL, 2)
        await part.write(pool_memory(content(4096)))
        part.close()
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(ssd_start, "BOOT_ID", tmp_path / "boot")
    for _ in range(2):
        async with opened(tmp_path / "ssd") as ssd:
            part = await ssd.part(MODEL, 2)
            assert part.size_bytes == 0
            part.close()


async def test_parts_that_nothing_can_come_of_are_removed(tmp_path: Path) -> None:
    async with opened(tmp_path) as ssd:
        await ssd.keep(a_checkpoint(bound=True), FILES)
        await put(ssd, MODEL, 1)
    for name in ("model-1/0", "model-1/1", "model-1/3", "model-1/02", "model-1/x", "model-2/0"):
        (tmp_path / "parts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(content(4096))
    (tmp_path / "parts" / "model-1" / "2").write_bytes(content(SIZES[2] + 1))
    (tmp_path / "parts" / "stray").write_bytes(b"")
    async with opened(tmp_path):
        assert parts(tmp_path) == ["BOOT", "model-1/0"]


async def test_a_cancelled_write_has_ended_when_it_returns(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    part = await ssd.part(MODEL, 2)
    await part.write(pool_memory(content(4096)))  # so that the file is there
    disk = SlowDisk(monkeypatch)
    writing = asyncio.create_task(part.write(pool_memory(content(4096))))
    await eventually(lambda: disk.asked == 1)
    for _ in range(2):
        writing.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not writing.done()
    disk.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert part.size_bytes == 8192
    part.close()


async def test_no_more_threads_block_on_the_disk_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_directory(tmp_path, threads=2) as ssd:
        await ssd.open()
        opened_parts = [await ssd.part(MODEL, position) for position in range(6)]
        disk = SlowDisk(monkeypatch)
        disk.go_on.set()
        await asyncio.gather(*(part.write(pool_memory(content(4096, n))) for n, part in enumerate(opened_parts)))
        await asyncio.gather(*(part.finish(chunk_digest(content(4096, n))) for n, part in enumerate(opened_parts)))
        assert disk.at_once_max == 2
        assert disk.asked >= 6 * len(("open", "write", "sync", "rename"))


PIECES = st.sampled_from([1, 100, 4095, 4096, 4097, 8192, 20_000])
STEPS = st.lists(st.tuples(PIECES, st.booleans(), st.booleans(), st.integers(1, 30_000)), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_any_sequence_of_writes_and_reopenings_gives_the_exact_bytes(
    steps: list[tuple[int, bool, bool, int]],
) -> None:
    """Each step: bytes to write, whether from aligned memory, whether it is reopened after, how much its first calls take."""
    data = content(sum(size for size, *_ in steps))

    async def run(root: Path, patch: pytest.MonkeyPatch) -> None:
        async with opened(root) as ssd:
            part = await ssd.part(MODEL, 0)
            done = 0
            for size, aligned, reopen, most in steps:
                patch.setattr(Writer, "write", short(most, times=20))
                piece = data[done : done + size]
                await part.write(pool_memory(piece) if aligned else memoryview(b"x" + piece)[1:])
                done += size
                if reopen:
                    part.close()
                    part = await ssd.part(MODEL, 0)
                assert part.size_bytes == done
                assert (root / "parts" / MODEL / "0").read_bytes() == data[:done]
            await part.finish(chunk_digest(data))
            assert ssd.chunk(chunk_digest(data)).read_bytes() == data
            assert await ssd.intact(chunk_digest(data))

    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(Path(root), patch))


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.support.ssd_rig import FILES, a_checkpoint, content, opened, pool_memory

async def main(root):
    async with opened(root) as ssd:
        await ssd.keep(a_checkpoint(), FILES)
        while True:
            for position, size in ((0, 2**20), (1, 5000), (2, 9000)):
                part = await ssd.part("model-1", position)
                data = content(16 * 2**20 if position == 0 else size, position)
                while part.size_bytes < len(data):
                    await part.write(pool_memory(data[part.size_bytes:][:size]))
                await part.discard()

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_after_a_kill_every_part_is_a_prefix_of_its_chunk(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    for round_ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=root)
        try:
            big = tmp_path / "parts" / MODEL / "0"
            await eventually(lambda big=big, round_=round_: big.exists() and big.stat().st_size > round_ * 2**22)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)
        async with opened(tmp_path) as ssd:
            for position in range(3):
                part = await ssd.part(MODEL, position)
                found = memoryview(bytearray(part.size_bytes))
                await part.read(found)
                assert found == content(part.size_bytes, position)
                assert part.size_bytes <= SIZES[position]
                await part.discard()

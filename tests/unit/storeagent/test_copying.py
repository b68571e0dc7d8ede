"""A chunk goes from memory to the disk while it arrives: in pieces, and exactly."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.ssd_rig import content
from tests.support.storeagent_fakes import Disk
from tests.support.virtual_time import in_virtual_time, others, steps

from stoker_checkpoint.digests import chunk_digest
from stoker_core.errors import StorageFailed, TierFull
from stoker_storeagent import copying
from stoker_storeagent.copying import Copy

PIECE = 8192
SIZE = 5 * PIECE + 4096 + 77
DATA = content(SIZE)
DIGEST = chunk_digest(DATA)
KEY = ("m", 0)
FULL, BROKEN = TierFull("ssd", 1, 0), StorageFailed("/ssd", "EIO")


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "PIECE_BYTES", PIECE)
        yield


async def begin(disk: Disk, begun_bytes: int = 0, size: int = SIZE) -> tuple[Copy, bytearray]:
    """A copy of a chunk of which an earlier run left begun_bytes."""
    if begun_bytes:
        disk.parts[KEY] = bytearray(DATA[:begun_bytes])
    place = bytearray(size)
    copy = Copy(await disk.part(*KEY), memoryview(place))
    copy.start()
    return copy, place


def arrive(copy: Copy, place: bytearray, upto: int) -> None:
    place[:upto] = DATA[:upto]
    copy.arrived(upto)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, SIZE),
    begun=st.integers(0, SIZE // 4096),
    arrivals=st.lists(st.integers(0, SIZE), max_size=12),
    pauses=st.lists(st.integers(0, 4), min_size=12, max_size=12),
)
@in_virtual_time
async def test_whatever_arrives_when_the_chunk_on_the_disk_has_exactly_its_bytes(
    size: int, begun: int, arrivals: list[int], pauses: list[int]
) -> None:
    disk = Disk()
    copy, place = await begin(disk, min(begun * 4096, size), size)
    assert copy.begun_bytes == min(begun * 4096, size)
    await copy.read_begun()
    assert bytes(place[: copy.begun_bytes]) == DATA[: copy.begun_bytes]
    have = copy.begun_bytes
    for arrival, pause in zip([*(a for a in sorted(arrivals) if have < a < size), size], [*pauses, 0], strict=False):
        arrive(copy, place, arrival)
        await steps(pause)
    await copy.finish(chunk_digest(DATA[:size]))
    await copy.close()
    assert disk.chunks == {chunk_digest(DATA[:size]): DATA[:size]}
    assert (disk.parts, disk.opened) == ({}, set())


@in_virtual_time
async def test_what_arrived_is_written_a_piece_at_a_time_while_the_rest_is_still_to_come() -> None:
    disk = Disk()
    copy, place = await begin(disk)
    arrive(copy, place, PIECE - 1)
    await steps(5)
    assert disk.parts[KEY] == b""
    arrive(copy, place, 3 * PIECE + 5000)
    await steps(5)
    assert disk.parts[KEY] == DATA[: 3 * PIECE + 4096]
    await copy.close()


@in_virtual_time
async def test_what_arrived_stays_for_the_next_who_wants_the_chunk() -> None:
    disk = Disk()
    copy, place = await begin(disk)
    arrive(copy, place, 3 * PIECE)
    await steps(5)
    await copy.close()
    await copy.close()
    assert disk.opened == set()
    again, place = await begin(disk)
    assert again.begun_bytes == 3 * PIECE
    await again.read_begun()
    arrive(again, place, SIZE)
    await again.finish(DIGEST)
    assert disk.chunks == {DIGEST: DATA}


@in_virtual_time
async def test_a_chunk_that_was_there_but_for_its_name_is_not_written_again() -> None:
    disk = Disk()
    copy, place = await begin(disk, SIZE)
    await copy.read_begun()
    assert bytes(place) == DATA
    await copy.finish(DIGEST)
    assert "write" not in disk.done
    assert disk.chunks == {DIGEST: DATA}


@in_virtual_time
async def test_nothing_is_left_of_what_is_discarded() -> None:
    disk = Disk()
    copy, place = await begin(disk, 2 * PIECE)
    arrive(copy, place, 4 * PIECE)
    await steps(2)
    await copy.discard()
    await copy.close()
    assert (disk.parts, disk.chunks, disk.opened) == ({}, {}, set())


@in_virtual_time
async def test_only_what_has_all_arrived_gets_its_name() -> None:
    disk = Disk()
    copy, place = await begin(disk)
    arrive(copy, place, SIZE - 1)
    with pytest.raises(AssertionError):
        await copy.finish(DIGEST)
    await copy.close()
    assert disk.chunks == {}


@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
@pytest.mark.parametrize("operation", ["write", "finish"])
@in_virtual_time
async def test_a_disk_that_fails_is_told_to_who_finishes_and_what_is_there_can_be_gone_on_with(
    operation: str, error: TierFull | StorageFailed
) -> None:
    disk = Disk()
    disk.faults[operation] = [error]
    copy, place = await begin(disk)
    arrive(copy, place, SIZE)
    with pytest.raises(type(error)):
        await copy.finish(DIGEST)
    await copy.close()
    again, place = await begin(disk)
    await again.read_begun()
    arrive(again, place, SIZE)
    await again.finish(DIGEST)
    assert disk.chunks == {DIGEST: DATA}


@pytest.mark.parametrize("how", ["close", "discard"])
@in_virtual_time
async def test_a_disk_that_failed_before_does_not_matter_to_who_gives_up(how: str) -> None:
    disk = Disk()
    disk.faults["write"] = [BROKEN]
    copy, place = await begin(disk)
    arrive(copy, place, SIZE)
    await steps(5)
    await (copy.close() if how == "close" else copy.discard())
    assert disk.opened == set()


@pytest.mark.parametrize("how", ["close", "discard"])
@in_virtual_time
async def test_who_gives_up_at_any_moment_leaves_no_write_behind(how: str) -> None:
    for moment in range(12):
        disk = Disk()
        copy, place = await begin(disk)
        for piece in range(1, 4):
            arrive(copy, place, piece * PIECE)
        await steps(moment)
        await (copy.close() if how == "close" else copy.discard())
        assert others() == set()
        assert disk.opened == set()
        assert (KEY in disk.parts) == (how == "close")
        assert DATA.startswith(bytes(disk.parts.get(KEY, b"")))


@in_virtual_time
async def test_who_is_cancelled_while_he_finishes_can_close_and_leaves_a_part_or_the_chunk() -> None:
    outcomes = set()
    for moment in range(12):
        disk = Disk()
        copy, place = await begin(disk)
        arrive(copy, place, SIZE)
        finishing = asyncio.create_task(copy.finish(DIGEST))
        await steps(moment)
        finishing.cancel()
        await asyncio.wait([finishing])
        await copy.close()
        assert others() == set()
        assert disk.opened == set()
        assert disk.chunks == {} or (disk.chunks == {DIGEST: DATA} and KEY not in disk.parts)
        outcomes.add(bool(disk.chunks))
    assert outcomes == {True, False}


@pytest.mark.parametrize("how", ["close", "discard"])
@in_virtual_time
async def test_who_is_cancelled_while_he_gives_up_closes_it_all_the_same(how: str) -> None:
    for moment in range(6):
        disk = Disk()
        copy, place = await begin(disk)
        arrive(copy, place, 3 * PIECE)
        ending = asyncio.create_task(
            copy.close() if how == "close" else copy.discard()
        )  # it begins to write just before
        await steps(moment)
        ending.cancel()
        await asyncio.wait([ending])
        assert ending.cancelled() or ending.exception() is None
        await copy.close()
        assert others() == set()
        assert disk.opened == set()

"""A model's place on the disk: taken before its chunks come, given back whatever happens."""

import asyncio
import errno

import pytest
from tests.support.storeagent_fakes import digests, model
from tests.support.transfer_rig import Rig
from tests.support.virtual_time import in_virtual_time, steps

from stoker_contracts.events import TIER_DAMAGED, TIER_FILLED, TIER_FILLING, TIER_REFUSED
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    LoadCancelled,
    PoolExhausted,
    ReadFailed,
    StokerError,
    StorageFailed,
    TierFull,
)
from stoker_storeagent.shelving import is_lasting

SIZES = (4096, 8192)
MODEL, BOUND = model(sizes=SIZES), model(sizes=SIZES, bound=True)
TOTAL = sum(SIZES)
DIGESTS = digests(MODEL)
IDLE = {"idle": {0: ("chunk of idle", TOTAL)}}
BROKEN = StorageFailed("/ssd", "EIO")
EIO = ReadFailed("/ssd", 0, errno.EIO)


def settled(rig: Rig) -> bool:
    """Whether nothing holds on to the model's place any more."""
    return rig.ledger.pins("m") == 0 and rig.ledger.claim("m") and rig.ledger.used_bytes == held(rig)


def held(rig: Rig) -> int:
    return sum(rig.ledger.chunks.values())


@in_virtual_time
async def test_room_is_taken_before_chunks_come_and_what_is_not_used_is_given_back() -> None:
    rig = Rig(MODEL, capacity_bytes=TOTAL)
    shelving = rig.shelving()
    await shelving.open(TOTAL)
    assert rig.ledger.used_bytes == TOTAL
    await shelving.arrived(0, DIGESTS[0])
    shelving.close()
    assert held(rig) == SIZES[0]
    assert settled(rig)
    assert len(rig.told.of(TIER_FILLING)) == 1
    assert rig.told.of(TIER_FILLED) == []


@in_virtual_time
async def test_a_model_that_is_on_the_disk_as_a_whole_is_said_to_be() -> None:
    rig = Rig(MODEL)
    shelving = rig.shelving()
    await shelving.open(TOTAL)
    for position in range(2):
        await shelving.arrived(position, DIGESTS[position])
    shelving.close()
    shelving.close()
    assert [data["bytes"] for _, data in rig.told.of(TIER_FILLED)] == [TOTAL]
    assert settled(rig)


@in_virtual_time
async def test_digests_are_noted_until_they_are_bound() -> None:
    for checkpoint, learnt in ((MODEL, {0: DIGESTS[0]}), (BOUND, {})):
        rig = Rig(checkpoint)
        shelving = rig.shelving()
        await shelving.open(TOTAL)
        await shelving.arriving(0, DIGESTS[0])
        shelving.close()
        assert rig.disk.learnt["m"] == learnt


@in_virtual_time
async def test_others_make_room_and_the_model_itself_stays_while_it_is_open() -> None:
    rig = Rig(MODEL, capacity_bytes=TOTAL, others=IDLE)
    shelving = rig.shelving()
    await shelving.open(TOTAL)
    assert {shelf.model_id for shelf in rig.ledger} == {"m"}
    await shelving.arrived(0, DIGESTS[0])
    await shelving.arrived(1, DIGESTS[1])
    assert not await shelving.make_room()
    shelving.close()
    assert rig.ledger.worst(0.0) == ["m"]


@in_virtual_time
async def test_without_room_nothing_is_copied_and_it_is_said_once() -> None:
    rig = Rig(MODEL, capacity_bytes=TOTAL - 1)
    shelving = rig.shelving()
    await shelving.open(TOTAL)
    assert await shelving.part(0) is None
    shelving.failed(BROKEN)
    shelving.close()
    assert [data["code"] for _, data in rig.told.of(TIER_REFUSED)] == ["tier_full"]
    assert settled(rig)


@in_virtual_time
async def test_without_room_what_is_for_the_disk_alone_is_refused() -> None:
    rig = Rig(MODEL, capacity_bytes=TOTAL - 1)
    shelving = rig.shelving(required=True)
    with pytest.raises(TierFull):
        await shelving.open(TOTAL)
    shelving.close()
    assert settled(rig)


@in_virtual_time
async def test_of_two_who_bring_a_model_one_copies_it() -> None:
    rig = Rig(MODEL)
    first, second, required = rig.shelving(), rig.shelving(), rig.shelving(required=True)
    await first.open(TOTAL)
    await second.open(TOTAL)
    with pytest.raises(LoadCancelled):
        await required.open(TOTAL)
    assert await second.part(0) is None
    second.close()
    required.close()
    part = await first.part(0)
    assert part is not None
    part.close()
    assert rig.ledger.pins("m") == 1
    first.close()
    assert settled(rig)


@pytest.mark.parametrize("required", [True, False])
@in_virtual_time
async def test_a_disk_that_cannot_remove_what_makes_room_costs_the_copy(required: bool) -> None:
    rig = Rig(MODEL, capacity_bytes=TOTAL, others=IDLE)
    rig.disk.faults["remove"] = [BROKEN]
    shelving = rig.shelving(required=required)
    if required:
        with pytest.raises(StorageFailed):
            await shelving.open(TOTAL)
    else:
        await shelving.open(TOTAL)
        assert await shelving.part(0) is None
    shelving.close()
    assert settled(rig)


@in_virtual_time
async def test_cancelled_while_others_make_room_it_gives_everything_back() -> None:
    for moment in range(4):
        rig = Rig(MODEL, capacity_bytes=TOTAL, others=IDLE)
        shelving = rig.shelving()
        opening = asyncio.create_task(shelving.open(TOTAL))
        await steps(moment)
        opening.cancel()
        await asyncio.wait([opening])
        shelving.close()
        assert settled(rig)


@in_virtual_time
async def test_what_is_on_the_disk_already_is_not_copied_again() -> None:
    rig = Rig(MODEL, on_disk=[0])
    shelving = rig.shelving()
    await shelving.open(SIZES[1])
    assert await shelving.part(0) is None
    part = await shelving.part(1)
    assert part is not None
    part.close()
    shelving.close()


@in_virtual_time
async def test_a_damaged_chunk_is_removed_and_its_place_is_taken_for_the_next_copy() -> None:
    rig = Rig(BOUND, on_disk=[0, 1], capacity_bytes=TOTAL)
    shelving = rig.shelving()
    await shelving.open(0)
    await shelving.damaged(0, EIO)
    assert DIGESTS[0] not in rig.disk.chunks
    assert rig.ledger.used_bytes == TOTAL
    assert [(subject, data["digest"]) for subject, data in rig.told.of(TIER_DAMAGED)] == [("m", DIGESTS[0])]
    part = await shelving.part(0)
    assert part is not None
    part.close()
    await shelving.damaged(0, EIO)  # it is not there any more
    assert len(rig.told.of(TIER_DAMAGED)) == 1
    shelving.close()


@in_virtual_time
async def test_a_damaged_chunk_is_no_models_any_more() -> None:
    rig = Rig(BOUND, on_disk=[0, 1], others={"same": {0: (DIGESTS[0], SIZES[0])}})
    shelving = rig.shelving()
    await shelving.open(0)
    await shelving.damaged(0, EIO)
    shelving.close()
    assert [subject for subject, _ in rig.told.of(TIER_DAMAGED)] == ["m", "same"]
    assert rig.ledger.held_bytes("same") == 0


@in_virtual_time
async def test_a_model_that_was_given_up_while_its_chunks_came_leaves_none() -> None:
    rig = Rig(MODEL)
    shelving = rig.shelving()
    await shelving.open(TOTAL)
    await shelving.arrived(0, DIGESTS[0])
    await rig.evict(["m"], "corrupt_checkpoint")
    rig.disk.chunks[DIGESTS[1]] = b"just arrived"
    await shelving.arrived(1, DIGESTS[1])
    assert await shelving.part(0) is None
    await shelving.damaged(1, EIO)
    shelving.close()
    assert rig.disk.chunks == {}
    assert rig.ledger.used_bytes == 0
    assert settled(rig)


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (CheckpointChanged("w", "it has 1 bytes, not 2"), True),
        (CorruptCheckpoint("w", "the chunk at byte 0 has another digest"), True),
        (EIO, True),
        (ReadFailed("w", 0, errno.ENOENT), True),
        (ReadFailed("w", 0, errno.EMFILE), False),
        (ReadFailed("w", 0, errno.ETIMEDOUT), False),
        (PoolExhausted(1, 0), False),
    ],
    ids=str,
)
def test_only_what_another_copy_mends_tells_against_a_chunk(error: StokerError, lasting: bool) -> None:
    assert is_lasting(error) is lasting

"""One model on its way: whatever becomes of peers, source and disk, what is published is right."""

import asyncio
import errno

import pytest
from tests.support.origin_fakes import Giver, Serve, Source
from tests.support.storeagent_fakes import Filling, digests, model, right
from tests.support.transfer_rig import Rig
from tests.support.virtual_time import in_virtual_time, steps

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.events import TIER_DAMAGED
from stoker_core.errors import (
    CorruptCheckpoint,
    PeerFailed,
    ReadFailed,
    SourceDenied,
    SourceUnavailable,
    StorageFailed,
)
from stoker_storeagent.records import Checkpoint

SIZES = (5000, 20000, 8192, 40000, 300)
MODEL, BOUND = model(sizes=SIZES), model(sizes=SIZES, bound=True)
BROKEN = StorageFailed("/ssd", "EIO")
AWAY, DENIED = SourceUnavailable("s3", "503"), SourceDenied("s3", "403")
EITHER = pytest.mark.parametrize("checkpoint", [MODEL, BOUND], ids=["unbound", "bound"])


def asked(rig: Rig) -> list[tuple[int, int]]:
    return sorted(rig.source.giver.asked)


@EITHER
@in_virtual_time
async def test_every_chunk_comes_once_into_memory_and_onto_the_disk(checkpoint: Checkpoint) -> None:
    rig = Rig(checkpoint)
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)
    assert asked(rig) == [(position, 0) for position in range(5)]
    assert rig.found == 1


@EITHER
@in_virtual_time
async def test_every_chunk_comes_once_onto_the_disk_alone(checkpoint: Checkpoint) -> None:
    rig = Rig(checkpoint)
    await rig.to_disk(at_once=2)
    rig.check_disk(whole=True)
    assert asked(rig) == [(position, 0) for position in range(5)]


@in_virtual_time
async def test_a_shard_of_several_chunks_comes_in_as_many() -> None:
    rig = Rig(model(sizes=(CHUNK_BYTES + 5000, 4096), bound=True), Source(model(sizes=(CHUNK_BYTES + 5000, 4096))))
    rig.source.giver.piece_bytes = 4 * 2**20
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)


@in_virtual_time
async def test_what_the_disk_has_is_not_fetched() -> None:
    rig = Rig(BOUND, on_disk=[0, 3])
    running = asyncio.create_task(rig.to_pool())
    await steps(60)
    assert not running.done()  # the disk may still give a position back
    assert rig.filling is not None
    rig.filling.read(0)
    rig.filling.read(3)
    await running
    rig.check_pool()
    rig.check_disk(whole=True)
    assert [position for position, _ in asked(rig)] == [1, 2, 4]


@pytest.mark.parametrize("moment", [0, 3, 60], ids=["at once", "between", "after the rest"])
@pytest.mark.parametrize("removed", [True, False], ids=["removed", "not removed"])
@in_virtual_time
async def test_a_chunk_that_the_disk_cannot_give_is_fetched_even_if_it_cannot_be_removed(
    moment: int, removed: bool
) -> None:
    rig = Rig(BOUND, on_disk=[0, 3])
    if not removed:
        rig.disk.faults["remove"] = [BROKEN]
    running = asyncio.create_task(rig.to_pool())
    await steps(2 + moment)
    assert rig.filling is not None
    rig.filling.read(3, ReadFailed("/ssd", 0, errno.EIO))
    await steps(moment)
    rig.filling.read(0)
    await running
    rig.check_pool()
    rig.check_disk(whole=removed)
    assert [data["digest"] for _, data in rig.told.of(TIER_DAMAGED)] == [digests(BOUND)[3]]
    assert (3, 0) in asked(rig)


@in_virtual_time
async def test_a_chunk_that_could_not_be_read_for_want_of_descriptors_stays_on_the_disk() -> None:
    rig = Rig(BOUND, on_disk=[0])
    running = asyncio.create_task(rig.to_pool())
    await steps(10)
    assert rig.filling is not None
    rig.filling.read(0, ReadFailed("/ssd", 0, errno.EMFILE))
    await running
    rig.check_pool()
    rig.check_disk(whole=True)
    assert rig.told.of(TIER_DAMAGED) == []
    assert "remove" not in rig.disk.done


@EITHER
@pytest.mark.parametrize(("begun", "offset"), [(8192, 8192), (40000, None)], ids=["begun", "all there"])
@in_virtual_time
async def test_what_an_earlier_run_left_of_a_chunk_is_not_fetched_again(
    checkpoint: Checkpoint, begun: int, offset: int | None
) -> None:
    rig = Rig(checkpoint)
    rig.disk.parts["m", 3] = bytearray(right(MODEL, 3)[:begun])
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)
    assert [at for position, at in asked(rig) if position == 3] == ([] if offset is None else [offset])


@pytest.mark.parametrize("begun", [8192, 40000], ids=["begun", "all there"])
@in_virtual_time
async def test_an_earlier_runs_wrong_bytes_are_fetched_anew_and_nobody_else_is_blamed(begun: int) -> None:
    peer = Giver(BOUND)
    rig = Rig(BOUND, peers={"n1": peer})
    rig.disk.parts["m", 3] = bytearray(begun)
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)
    assert peer.asked.count((3, 0)) == 1
    assert rig.peers.suspected == []


@EITHER
@in_virtual_time
async def test_a_peers_wrong_bytes_are_fetched_elsewhere_and_it_is_suspected(checkpoint: Checkpoint) -> None:
    rig = Rig(checkpoint, peers={"n1": Giver(MODEL, then=Serve(wrong=True))})
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)
    assert {node for node, _ in rig.peers.suspected} == {"n1"}


@in_virtual_time
async def test_a_peer_that_has_another_digest_than_its_bytes_is_not_believed_before_there_is_one_for_all() -> None:
    rig = Rig(MODEL, peers={"n1": Giver(MODEL, said=digests(model(sizes=(999,)))[0])})
    await rig.to_pool()
    rig.check_pool()
    assert {node for node, _ in rig.peers.suspected} == {"n1"}


@in_virtual_time
async def test_what_a_peer_says_does_not_matter_where_the_digest_is_bound() -> None:
    rig = Rig(BOUND, peers={"n1": Giver(MODEL, said="xxh3_128:" + "0" * 32)})
    await rig.to_pool()
    rig.check_pool()
    assert (rig.peers.suspected, asked(rig)) == ([], [])


@EITHER
@in_virtual_time
async def test_a_source_is_not_blamed_for_the_wrong_bytes_of_a_peer_that_broke_off(checkpoint: Checkpoint) -> None:
    broke = Serve(4000, PeerFailed("n1", "closed"), wrong=True)
    rig = Rig(checkpoint, peers={"n1": Giver(MODEL, then=broke)})
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)


@in_virtual_time
async def test_wrong_bytes_of_the_only_source_end_the_load_and_nothing_of_them_stays() -> None:
    rig = Rig(BOUND, Source(BOUND, then=Serve(wrong=True)))
    with pytest.raises(CorruptCheckpoint):
        await rig.to_pool()
    assert rig.filling is not None
    assert rig.filling.failed
    assert rig.filling.published == {}
    rig.check_disk(whole=False)
    assert rig.disk.chunks == {}


@in_virtual_time
async def test_what_cannot_be_had_fails_its_position_with_the_reason() -> None:
    rig = Rig(MODEL, Source(MODEL, Serve(), Serve(2000, DENIED), then=Serve(0, AWAY)))
    with pytest.raises(SourceDenied) as caught:
        await rig.to_pool()
    assert caught.value is DENIED
    assert rig.filling is not None
    assert rig.filling.failed == [1]
    rig.check_disk(whole=False)


@in_virtual_time
async def test_a_source_that_comes_back_is_gone_on_with() -> None:
    rig = Rig(MODEL, Source(MODEL, *[Serve(3000, AWAY)] * 7))
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=True)


@in_virtual_time
async def test_through_a_window_a_position_is_published_once_it_is_on_the_disk_and_fetched_once_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(BOUND)
    publish = Filling.publish

    def checked(filling: Filling, position: int) -> None:
        assert digests(BOUND)[position] in rig.disk.chunks
        publish(filling, position)

    monkeypatch.setattr(Filling, "publish", checked)
    running = asyncio.create_task(rig.to_pool(window_chunks=2))
    for position in range(BOUND.positions):
        while not running.done() and (rig.filling is None or position not in rig.filling.published):
            await asyncio.sleep(0.001)
        assert rig.filling is not None
        assert max(rig.filling.published) < position + 2
        await asyncio.sleep(1)
        assert max(at for at, _ in asked(rig)) < position + 2
        rig.filling.release(position + 1)
    await running
    rig.check_pool()
    rig.check_disk(whole=True)


@in_virtual_time
async def test_a_chunk_that_the_disk_cannot_give_does_not_wait_behind_those_whose_window_it_is_to_open() -> None:
    rig = Rig(BOUND, on_disk=[0])
    running = asyncio.create_task(rig.to_pool(window_chunks=2, at_once=1))
    await asyncio.sleep(1)  # 1 was fetched, and 2 waits for room
    assert rig.filling is not None
    rig.filling.read(0, ReadFailed("/ssd", 0, errno.EIO))
    for position in range(BOUND.positions):
        await asyncio.sleep(1)
        assert position in rig.filling.published
        rig.filling.release(position + 1)
    await running
    rig.check_pool()
    rig.check_disk(whole=True)


@in_virtual_time
async def test_no_more_is_asked_for_at_once_than_there_are_slots() -> None:
    rig = Rig(MODEL)
    await rig.to_pool(at_once=5)
    assert rig.source.giver.at_once_max == 4
    assert rig.slots.waiting == 0


@in_virtual_time
async def test_progress_ascends_to_all_that_was_missing() -> None:
    rig = Rig(MODEL)
    running, seen = asyncio.create_task(rig.to_pool()), [0]
    while not running.done():
        await asyncio.sleep(0)
        if rig.transfer is not None:
            seen.append(rig.transfer.arrived_bytes)
    assert seen == sorted(seen)
    assert seen[-1] == MODEL.weight_bytes
    assert len(set(seen)) > 5

"""What becomes of the copy on the disk while a model is on its way; and of everything, when that is cancelled."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.support.origin_fakes import Giver, Serve
from tests.support.storeagent_fakes import model, right
from tests.support.transfer_rig import Rig
from tests.support.virtual_time import in_virtual_time, steps

from stoker_contracts.events import TIER_REFUSED
from stoker_core.errors import LoadCancelled, StokerError, StorageFailed, TierFull

SIZES = (5000, 20000, 8192, 40000, 300)
MODEL, BOUND = model(sizes=SIZES), model(sizes=SIZES, bound=True)
FULL, BROKEN = TierFull("ssd", 1, 0), StorageFailed("/ssd", "EIO")
OTHERS = {name: {0: (f"chunk of {name}", 100)} for name in ("a", "b")}


@in_virtual_time
async def test_a_disk_that_is_fuller_than_its_budget_says_has_others_make_room() -> None:
    rig = Rig(MODEL, others=OTHERS)
    rig.disk.faults["write"] = [FULL, None, FULL]
    await rig.to_pool()
    rig.check_pool()
    assert {shelf.model_id for shelf in rig.ledger} == {"m"}
    assert rig.told.of(TIER_REFUSED) == []
    assert len(rig.disk.chunks) == MODEL.positions


@pytest.mark.parametrize("operation", ["write", "finish"])
@in_virtual_time
async def test_a_full_disk_that_has_nothing_to_give_up_costs_the_copy_alone(operation: str) -> None:
    rig = Rig(MODEL)
    rig.disk.faults[operation] = [FULL] * 9
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=False)
    assert [data["code"] for _, data in rig.told.of(TIER_REFUSED)] == ["tier_full"]


@pytest.mark.parametrize("operation", ["part", "read", "write", "finish", "learn", "discard"])
@in_virtual_time
async def test_a_disk_that_fails_costs_the_copy_alone(operation: str) -> None:
    checkpoint = BOUND if operation == "discard" else MODEL
    rig = Rig(checkpoint)
    rig.disk.parts["m", 3] = bytearray(8192) if operation == "discard" else bytearray(right(MODEL, 3)[:8192])
    rig.disk.faults[operation] = [BROKEN]
    await rig.to_pool()
    rig.check_pool()
    rig.check_disk(whole=False)
    assert [data["code"] for _, data in rig.told.of(TIER_REFUSED)] == ["storage_failed"]


@pytest.mark.parametrize(
    ("operation", "error"),
    [("read", BROKEN), *((operation, error) for operation in ("part", "write", "finish") for error in (FULL, BROKEN))],
)
@in_virtual_time
async def test_a_disk_that_fails_ends_what_was_for_the_disk_alone(operation: str, error: StokerError) -> None:
    rig = Rig(MODEL)
    rig.disk.parts["m", 3] = bytearray(right(MODEL, 3)[:8192])
    rig.disk.faults[operation] = [error]
    with pytest.raises(type(error)):
        await rig.to_disk()
    rig.check_disk(whole=False)


@in_virtual_time
async def test_a_model_that_does_not_fit_on_the_disk_comes_without_a_copy() -> None:
    rig = Rig(MODEL, capacity_bytes=1000)
    await rig.to_pool()
    rig.check_pool()
    assert (rig.disk.chunks, rig.disk.parts) == ({}, {})
    with pytest.raises(TierFull):
        await rig.to_disk()


@in_virtual_time
async def test_what_somebody_else_copies_is_not_copied_twice() -> None:
    rig = Rig(MODEL)
    assert rig.ledger.claim("m")
    await rig.to_pool()
    rig.check_pool()
    assert "part" not in rig.disk.done
    with pytest.raises(LoadCancelled):
        await rig.to_disk()


def resumed() -> Rig:
    rig = Rig(BOUND, peers={"n1": Giver(BOUND, [Serve(), Serve(wrong=True)])}, others=OTHERS)
    rig.disk.parts["m", 1] = bytearray(right(MODEL, 1)[:8192])
    rig.disk.parts["m", 3] = bytearray(8192)
    rig.disk.faults["write"] = [None, FULL]
    return rig


@pytest.mark.parametrize("make", [resumed, lambda: Rig(MODEL)], ids=["faults", "plain"])
@pytest.mark.parametrize(
    "run", [Rig.to_pool, Rig.to_disk, lambda rig: rig.to_pool(window_chunks=5)], ids=["pool", "disk", "window"]
)
@in_virtual_time
async def test_cancelled_at_any_moment_it_leaves_no_task_and_nothing_open_and_the_next_run_goes_on(
    make: Callable[[], Rig], run: Callable[[Rig], Awaitable[None]]
) -> None:
    moment, finished = 0, False
    while not finished:
        rig = make()
        running = asyncio.ensure_future(run(rig))
        await steps(moment)
        finished = running.done()
        running.cancel()
        await asyncio.wait([running])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        rig.check_disk(whole=finished)
        assert rig.source.giver.at_once == 0
        if moment % 5 == 0 or finished:
            again = Rig(BOUND, disk=rig.disk)
            await again.to_pool(at_once=1)
            again.check_pool()
        moment += 1
    assert moment > 10

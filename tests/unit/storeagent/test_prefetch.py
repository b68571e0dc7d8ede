"""Orders to bring models ahead of use: whose turn it is, when they end, and what is said of them."""

import asyncio

import pytest
from tests.support.prefetch_rig import running
from tests.support.virtual_time import in_virtual_time, steps

from stoker_contracts.events import (
    TIER_PREFETCH_DONE,
    TIER_PREFETCH_PROGRESS,
    TIER_PREFETCH_QUEUED,
    TIER_PREFETCH_STARTED,
)
from stoker_contracts.models import Tier
from stoker_core.errors import (
    InvalidRequest,
    LoadCancelled,
    Overloaded,
    PoolExhausted,
    SourceDenied,
    StokerError,
    TierFull,
)
from stoker_storeagent import prefetch
from stoker_storeagent.prefetch import AGAIN_S, AT_ONCE, TRIES
from stoker_storeagent.slots import RANK_START


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
@in_virtual_time
async def test_an_order_is_carried_out_and_every_step_of_it_told(tier: Tier) -> None:
    async with running() as rig:
        rig.order("a", tier, priority=3, sources=("n1", "n2"))
        await asyncio.sleep(2.5)
        rig.tiers.end("a")
        await steps(10)
    assert [event for event, _, _ in rig.told.all] == [
        TIER_PREFETCH_QUEUED,
        TIER_PREFETCH_STARTED,
        TIER_PREFETCH_PROGRESS,
        TIER_PREFETCH_PROGRESS,
        TIER_PREFETCH_DONE,
    ]
    assert all(data["tier"] is tier and data["model"] == "name of a" for _, _, data in rig.told.all)
    assert rig.told.of(TIER_PREFETCH_PROGRESS)[0][1].items() >= {"done_bytes": 40, "bytes": 100}.items()
    assert rig.told.of(TIER_PREFETCH_DONE)[0][1].items() >= {"bytes": 100, "ms": 2500}.items()
    assert rig.tiers.wanted["a"] == ("n1", "n2")


@in_virtual_time
async def test_so_many_are_worked_on_and_the_rest_wait_by_priority_then_deadline_then_arrival() -> None:
    async with running() as rig:
        first = [f"first {number}" for number in range(AT_ONCE)]
        for model_id in first:
            rig.order(model_id)
        await steps(5)
        rig.order("low")
        rig.order("also low")
        rig.order("soon", budget_ms=60_000)
        rig.order("high", priority=5)
        await steps(5)
        assert rig.tiers.began == first
        assert rig.prefetcher.waiting == 4
        for _ in range(4):
            rig.tiers.end(next(iter(rig.tiers.loads)))
            await steps(10)
        assert rig.tiers.began == [*first, "high", "soon", "low", "also low"]


@in_virtual_time
async def test_an_order_that_does_not_begin_in_time_is_dropped_and_one_that_did_goes_on() -> None:
    async with running() as rig:
        for number in range(AT_ONCE):
            rig.order(str(number), budget_ms=1000)
        await steps(5)
        rig.order("late", budget_ms=2000)
        await asyncio.sleep(2.5)
        assert rig.outcomes() == [("late", "deadline")]
        assert len(rig.tiers.loads) == AT_ONCE


@in_virtual_time
async def test_an_order_takes_the_place_of_one_that_waits_for_the_same_model() -> None:
    async with running() as rig:
        for number in range(AT_ONCE):
            rig.order(str(number))
        rig.order("a", Tier.SSD)
        rig.order("a", Tier.DRAM, sources=("n1",))
        await steps(5)
        assert rig.outcomes() == [("a", "replaced")]
        rig.tiers.end("0")
        await steps(10)
        assert rig.tiers.wanted["a"] == ("n1",)
        assert rig.tiers.began.count("a") == 1


@in_virtual_time
async def test_a_repeat_does_not_begin_anew_but_counts_with_its_priority() -> None:
    async with running() as rig:
        rig.order("a")
        await steps(10)
        rig.order("a", priority=7)
        await steps(10)
        assert rig.tiers.began == ["a"]
        assert rig.tiers.loads["a"].turn.rank[:2] == (1, -7)
        assert len(rig.told.of(TIER_PREFETCH_QUEUED)) == 1
        assert rig.outcomes() == []


@in_virtual_time
async def test_a_repeat_does_not_put_off_a_start_that_waits_for_the_same_load() -> None:
    async with running() as rig:
        rig.order("a")
        await steps(10)
        rig.tiers.loads["a"].turn.hasten(RANK_START)
        rig.order("a", priority=7)
        assert rig.tiers.loads["a"].turn.starting


@in_virtual_time
async def test_an_order_for_another_tier_ends_the_one_that_is_under_way() -> None:
    async with running() as rig:
        rig.order("a", Tier.SSD)
        await steps(10)
        rig.order("a", Tier.DRAM)
        await steps(20)
        assert rig.tiers.given_up == ["a"]
        assert rig.tiers.began == ["a", "a"]
        rig.tiers.end("a")
        await steps(10)
        assert rig.outcomes() == [("a", "replaced"), ("a", "done")]


@in_virtual_time
async def test_one_that_waits_is_cancelled_before_it_begins() -> None:
    async with running() as rig:
        for number in range(AT_ONCE):
            rig.order(str(number))
        rig.order("a")
        await steps(5)
        rig.prefetcher.cancel("a")
        rig.prefetcher.cancel("a")
        rig.prefetcher.cancel("never ordered")
        for number in range(AT_ONCE):
            rig.tiers.end(str(number))
        await steps(20)
        assert "a" not in rig.tiers.began
        assert [subject for subject, why in rig.outcomes() if why == "cancelled"] == ["a"]


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
@in_virtual_time
async def test_one_that_is_under_way_is_cancelled_at_any_moment_and_the_next_begins(tier: Tier) -> None:
    for moment in range(12):
        async with running() as rig:
            for model_id in ("a", *map(str, range(AT_ONCE))):
                rig.order(model_id, tier)
            await steps(moment)
            rig.prefetcher.cancel("a")
            await steps(20)
            assert rig.outcomes() == [("a", "cancelled")]
            assert sorted(rig.tiers.loads) == list(map(str, range(AT_ONCE)))


@pytest.mark.parametrize("error", [LoadCancelled(), PoolExhausted(2, 1)], ids=lambda error: error.code)
@in_virtual_time
async def test_what_gave_way_is_tried_again_later_and_its_deadline_was_to_begin(error: StokerError) -> None:
    async with running() as rig:
        rig.tiers.refused["a"] = [error]
        rig.order("a", budget_ms=1000)
        await asyncio.sleep(AGAIN_S - 0.1)
        assert rig.tiers.began == ["a"]
        await asyncio.sleep(0.2)
        rig.tiers.end("a", error)  # and once more, in the middle
        await asyncio.sleep(AGAIN_S + 0.1)
        rig.tiers.end("a")
        await steps(10)
        assert rig.tiers.began == ["a", "a", "a"]
        assert rig.outcomes() == [("a", "done")]
        assert len(rig.told.of(TIER_PREFETCH_STARTED)) == 1


@in_virtual_time
async def test_what_gave_way_does_not_keep_others_from_their_turn() -> None:
    async with running() as rig:
        for number in range(AT_ONCE):
            rig.tiers.refused[str(number)] = [PoolExhausted(2, 1)]
            rig.order(str(number), priority=9)
        rig.order("a")
        await steps(20)
        assert list(rig.tiers.loads) == ["a"]


@in_virtual_time
async def test_what_gives_way_for_ever_fails_in_the_end() -> None:
    async with running() as rig:
        rig.tiers.refused["a"] = [PoolExhausted(2, 1)] * TRIES
        rig.order("a")
        await asyncio.sleep(AGAIN_S * TRIES * 2)
        assert rig.outcomes() == [("a", "pool_exhausted")]
        assert len(rig.tiers.began) == TRIES


@in_virtual_time
async def test_what_gave_way_is_cancelled_while_it_waits() -> None:
    async with running() as rig:
        rig.tiers.refused["a"] = [LoadCancelled()]
        rig.order("a")
        await asyncio.sleep(1)
        rig.prefetcher.cancel("a")
        await asyncio.sleep(AGAIN_S * 2)
        assert rig.tiers.began == ["a"]
        assert rig.outcomes() == [("a", "cancelled")]


@pytest.mark.parametrize("error", [SourceDenied("s3", "403"), TierFull("ssd", 2, 1)], ids=lambda error: error.code)
@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
@in_virtual_time
async def test_what_cannot_be_had_fails_with_the_reason_and_can_be_ordered_again(
    tier: Tier, error: StokerError
) -> None:
    async with running() as rig:
        rig.order("a", tier)
        rig.order("b", tier)
        await steps(10)
        rig.tiers.end("a", error)
        await steps(10)
        assert rig.outcomes() == [("a", error.code)]
        assert list(rig.tiers.loads) == ["b"]
        rig.order("a", tier)
        await steps(10)
        assert sorted(rig.tiers.loads) == ["a", "b"]


@in_virtual_time
async def test_the_queue_is_bounded_and_what_is_in_it_can_still_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "QUEUE_MAX", 2)
    async with running() as rig:
        rig.order("a")
        rig.order("b")
        with pytest.raises(Overloaded) as caught:
            rig.order("c")
        assert caught.value.retry_after_ms > 0
        rig.order("a", Tier.SSD)
        await steps(10)
        rig.tiers.end("b")
        await steps(10)
        rig.order("c")


@pytest.mark.parametrize("tier", [Tier.PEER, Tier.REMOTE])
@in_virtual_time
async def test_nothing_is_prefetched_into_what_is_no_tier_of_this_node(tier: Tier) -> None:
    async with running() as rig:
        with pytest.raises(InvalidRequest):
            rig.order("a", tier)
        assert rig.told.all == []

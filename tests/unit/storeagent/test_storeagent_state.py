import pytest

from stoker_core.errors import TierFull
from stoker_storeagent.state import Ledger, Rate


def ledger(capacity: int, *ready: tuple[str, int, float]) -> Ledger:
    made = Ledger("ssd", capacity)
    for model_id, size, used_s in ready:
        made.adopt(model_id, size, used_s)
    return made


def test_room_is_made_from_the_least_recently_used() -> None:
    tier = ledger(100, ("new", 40, 3.0), ("old", 30, 1.0), ("middle", 30, 2.0))
    assert [victim.model_id for victim in tier.reserve("x", 50, 4.0)] == ["old", "middle"]
    assert tier.used_bytes == 90


def test_nothing_is_evicted_while_there_is_room() -> None:
    assert ledger(100, ("old", 30, 1.0)).reserve("x", 70, 2.0) == []


def test_pinned_models_and_copies_in_progress_are_never_evicted() -> None:
    tier = ledger(100, ("leased", 40, 1.0))
    tier.reserve("filling", 40, 2.0)
    tier.pin("leased")
    with pytest.raises(TierFull) as caught:
        tier.reserve("x", 50, 3.0)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (50, 20)
    assert tier.evict_one() is None
    assert {entry.model_id for entry in tier} == {"leased", "filling"}


def test_a_refused_reservation_changes_nothing() -> None:
    tier = ledger(100, ("idle", 30, 1.0), ("leased", 40, 2.0))
    tier.pin("leased")
    with pytest.raises(TierFull):
        tier.reserve("x", 70, 3.0)
    assert {entry.model_id for entry in tier} == {"idle", "leased"}


def test_a_model_may_go_once_every_pin_is_returned() -> None:
    tier = ledger(100, ("a", 40, 1.0))
    tier.pin("a")
    tier.pin("a")
    tier.unpin("a")
    assert tier.evict_one() is None
    tier.unpin("a")
    victim = tier.evict_one()
    assert victim is not None
    assert victim.model_id == "a"


def test_a_model_is_ready_only_once_it_was_filled() -> None:
    tier = ledger(100)
    tier.reserve("a", 40, 1.0)
    assert tier.ready("a") is None
    tier.filled("a")
    assert tier.ready("a") is not None


def test_a_tier_that_shrank_gives_up_the_least_recently_used() -> None:
    tier = ledger(50, ("a", 30, 1.0), ("b", 30, 2.0), ("c", 20, 3.0))
    assert [victim.model_id for victim in tier.excess()] == ["a"]


def test_a_rate_is_the_median_of_the_last_sixteen() -> None:
    rate = Rate()
    assert rate.bytes_per_s == 0.0
    for size in (100, 110, 90, 1, 105):
        rate.add(size, 1.0)
    assert rate.bytes_per_s == 100.0
    rate.add(0, 1.0)
    rate.add(1000, 0.0)
    assert rate.bytes_per_s == 100.0
    for _ in range(16):
        rate.add(7, 1.0)
    assert rate.bytes_per_s == 7.0

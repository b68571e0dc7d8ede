"""How many instances a load justifies, and the samples that tell it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from stoker_policy import loads
from stoker_policy.loads import HORIZON_MS, Load, Loads
from stoker_policy.replicas import PANIC_MS, STABLE_MS, Limits, Replicas, wanted

many = settings(max_examples=100, deadline=None)
SLOTS = 10  # so an instance should have 7 requests in hand
MANY = Limits(max_replicas=100)


def constant(concurrency: int, ready: int, *, seconds: int = 70) -> list[Load]:
    return [Load(age_ms=s * 1000, running=concurrency, queued=0, ready=ready) for s in range(seconds)]


def step(low: int, high: int, since_s: int, ready: int, *, seconds: int = 70) -> list[Load]:
    """`high` for the last `since_s` seconds, `low` before."""
    return [Load(age_ms=s * 1000, running=high if s <= since_s else low, queued=0, ready=ready) for s in range(seconds)]


def count(samples: list[Load], ready: int, limits: Limits = MANY) -> int:
    return wanted(limits, samples, ready=ready, slots=SLOTS).count


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    least = draw(st.integers(0, 4))
    return Limits(
        min_replicas=least,
        max_replicas=max(1, least + draw(st.integers(0, 20))),
        target_concurrency=draw(st.sampled_from((0.0, 0.5, 1.0, 3.3, 100.0))),
    )


samples = st.lists(
    st.builds(
        Load,
        age_ms=st.one_of(st.integers(0, 70_000), st.sampled_from((0, 1000, 6000, 60_000, 66_000))),
        running=st.integers(0, 60),
        queued=st.sampled_from((0, 0, 0, 5, 200)),
        ready=st.integers(0, 8),
    ),
    max_size=25,
)
readies = st.integers(0, 8)
slots = st.sampled_from((1, 2, 8, 10))


def test_a_load_gets_as_many_instances_as_leave_each_at_its_target() -> None:
    assert count(constant(14, ready=2), ready=2) == 2
    assert count(constant(15, ready=2), ready=2) == 3


def test_a_load_of_exactly_so_many_targets_is_not_rounded_up_by_a_fraction_of_a_bit() -> None:
    assert 21 / 1.4 > 15
    assert wanted(MANY, constant(21, ready=15), ready=15, slots=2).count == 15


def test_each_sample_counts_for_as_long_as_it_held() -> None:
    uneven = [Load(age_ms=30_000, running=21, queued=0, ready=2), Load(age_ms=120_000, running=7, queued=0, ready=2)]
    assert wanted(MANY, uneven, ready=2, slots=SLOTS).reason == "14 in hand over 60 s at 7 each"


def test_the_target_of_the_model_counts_if_it_has_one() -> None:
    assert count(constant(14, ready=7), ready=7, limits=Limits(max_replicas=100, target_concurrency=2)) == 7


def test_one_request_after_the_other_needs_one_instance_even_if_it_has_one_slot() -> None:
    assert wanted(MANY, constant(1, ready=1), ready=1, slots=1).count == 1


def test_a_target_above_the_slots_counts_as_the_slots() -> None:
    assert count(constant(20, ready=2), ready=2, limits=Limits(max_replicas=100, target_concurrency=50)) == 2


def test_no_load_for_a_stable_window_is_none() -> None:
    assert count(constant(0, ready=8), ready=8) == 0


def test_no_load_for_a_shorter_time_is_not_none() -> None:
    assert count(step(5, 0, since_s=50, ready=1), ready=1) == 1


def test_without_load_the_least_number_stays() -> None:
    assert count(constant(0, ready=8), ready=8, limits=Limits(min_replicas=2, max_replicas=9)) == 2
    assert count([], ready=0, limits=Limits(min_replicas=2, max_replicas=9)) == 2


def test_a_new_leader_stops_nothing_before_it_has_watched_a_stable_window() -> None:
    assert count([], ready=5) == 5
    assert count(constant(0, ready=5, seconds=30), ready=5) == 5
    assert count(constant(0, ready=5, seconds=61), ready=5) == 0


def test_requests_that_find_no_instance_get_at_once_as_many_as_they_fill() -> None:
    queued = [Load(age_ms=0, running=0, queued=95, ready=0), *constant(0, ready=0)[1:]]
    assert count(queued, ready=0) == 10
    assert count([Load(age_ms=0, running=0, queued=1, ready=0)], ready=0) == 1


def test_what_ended_with_its_keep_alive_does_not_start_again_for_an_average() -> None:
    assert count(step(7, 0, since_s=15, ready=1), ready=0) == 0


def test_a_burst_is_answered_before_the_stable_window_shows_it() -> None:
    burst = wanted(MANY, step(20, 70, since_s=5, ready=4), ready=4, slots=SLOTS)
    assert burst == Replicas(count=8, panic=True, reason="a burst: up to 70 in hand at 7 each")
    assert wanted(MANY, constant(25, ready=4), ready=4, slots=SLOTS).count == 4


def test_a_panic_lasts_for_a_stable_window_after_the_burst() -> None:
    def after(burst_s_ago: int) -> Replicas:
        """A burst of ten seconds that two instances met, and two instances more since then."""
        burst = range(burst_s_ago, burst_s_ago + 10)
        history = [
            Load(age_ms=s * 1000, running=28 if s in burst else 7, queued=0, ready=2 if s in burst else 4)
            for s in range(HORIZON_MS // 1000)
        ]
        return wanted(MANY, history, ready=4, slots=SLOTS)

    for burst_s_ago in (1, 20, 50):
        assert after(burst_s_ago).panic
        assert after(burst_s_ago).count == 4
    assert not after(63).panic
    assert after(63).count == 2


def test_a_burst_is_followed_by_doubling_until_it_is_met_and_nothing_is_taken_back_meanwhile() -> None:
    """Instances become ready two seconds after they were asked for."""
    noted, orders = Loads(), [(0, 1)]
    for now_ms in range(0, 160_000, 1000):
        ready = next(number for at_ms, number in reversed(orders) if at_ms <= now_ms)
        noted.note("m", now_ms, running=7 if now_ms < 100_000 else 70, queued=0, ready=ready)
        orders.append((now_ms + 2000, wanted(MANY, noted.samples("m", now_ms), ready=ready, slots=SLOTS).count))
    numbers = [number for _, number in orders]
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 4, 8, 10}
    assert numbers[115] == 10


def test_a_load_a_little_above_the_target_is_no_panic() -> None:
    assert not wanted(MANY, constant(8, ready=1), ready=1, slots=SLOTS).panic


def test_the_number_at_most_doubles_and_at_most_halves() -> None:
    assert count(constant(700, ready=4), ready=4) == 8
    assert count(constant(1, ready=9), ready=9) == 4


def test_a_load_that_comes_close_to_needing_one_more_keeps_it() -> None:
    assert count(constant(139, ready=20), ready=20, limits=Limits(max_replicas=100, target_concurrency=7)) == 20
    assert count(constant(139, ready=21), ready=21, limits=Limits(max_replicas=100, target_concurrency=7)) == 20
    assert count(constant(140, ready=21), ready=21, limits=Limits(max_replicas=100, target_concurrency=7)) == 21


def test_the_reason_says_what_was_wanted_before_the_limit() -> None:
    limited = wanted(Limits(max_replicas=3), constant(35, ready=3), ready=3, slots=SLOTS)
    assert limited.count == 3
    assert limited.reason == "35 in hand over 60 s at 7 each: 5, limited to 3"


@pytest.mark.parametrize(
    "fields",
    [
        {"min_replicas": -1},
        {"min_replicas": 2, "max_replicas": 1},
        {"max_replicas": 0},
        {"target_concurrency": -1.0},
        {"target_concurrency": math.nan},
        {"target_concurrency": math.inf},
    ],
)
def test_limits_that_contradict_themselves_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Limits(**fields)  # type: ignore[arg-type]


@many
@given(limits(), samples, readies, slots)
def test_the_number_is_within_its_limits(bounds: Limits, seen: list[Load], ready: int, slots: int) -> None:
    assert bounds.min_replicas <= wanted(bounds, seen, ready=ready, slots=slots).count <= bounds.max_replicas


@many
@given(limits(), samples, readies, slots, st.data())
def test_more_load_never_gives_fewer(
    bounds: Limits, seen: list[Load], ready: int, slots: int, data: st.DataObject
) -> None:
    more = [
        replace(s, running=s.running + data.draw(st.sampled_from((0, 0, 1, 50))), queued=s.queued + extra)
        for s, extra in zip(
            seen, data.draw(st.lists(st.sampled_from((0, 3)), min_size=len(seen), max_size=len(seen))), strict=True
        )
    ]
    assert wanted(bounds, more, ready=ready, slots=slots).count >= wanted(bounds, seen, ready=ready, slots=slots).count


@many
@given(samples, readies, slots, st.randoms(use_true_random=False))
def test_the_order_of_samples_means_nothing(seen: list[Load], ready: int, slots: int, chance: object) -> None:
    shuffled = list(seen)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert wanted(MANY, shuffled, ready=ready, slots=slots) == wanted(MANY, seen, ready=ready, slots=slots)


@many
@given(limits(), samples, readies, slots)
def test_a_stable_window_without_load_gives_the_least_number_whatever_was_before(
    bounds: Limits, seen: list[Load], ready: int, slots: int
) -> None:
    before = [s for s in seen if s.age_ms > STABLE_MS]
    quiet = [Load(age_ms=age_ms, running=0, queued=0, ready=ready) for age_ms in (0, 20_000, STABLE_MS)]
    assert wanted(bounds, [*quiet, *before], ready=ready, slots=slots).count == bounds.min_replicas


@many
@given(st.integers(1, 6), st.integers(0, 7), slots)
def test_a_burst_of_twice_what_all_should_have_is_a_panic_within_one_window(ready: int, low: int, slots: int) -> None:
    high = math.ceil(2 * MANY.target(slots) * ready)
    seen = step(min(low, high), high, since_s=PANIC_MS // 1000, ready=ready)
    found = wanted(MANY, seen, ready=ready, slots=slots)
    assert found.panic
    assert found.count == 2 * ready


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(0, 40), slots, st.sampled_from((1000, 2500)))
def test_a_constant_load_settles_within_the_windows_and_never_moves_again(
    concurrency: int, ready: int, slots: int, every_ms: int
) -> None:
    """Instances become ready, and are gone, five seconds after they were asked for."""
    noted, orders, late_moves = Loads(), [(0, ready)], []
    for now_ms in range(0, 200_000, every_ms):
        ready = next(number for at_ms, number in reversed(orders) if at_ms <= now_ms)
        noted.note("m", now_ms, running=concurrency, queued=0, ready=ready)
        found = wanted(MANY, noted.samples("m", now_ms), ready=ready, slots=slots).count
        if found != ready and now_ms > 130_000:
            late_moves.append((now_ms, ready, found))
        orders.append((now_ms + 5000, found))
    assert late_moves == []
    needed = concurrency / MANY.target(slots)
    assert ready == MANY.max_replicas or needed - 0.001 <= ready <= needed + 1.101


def test_samples_hold_what_was_noted_newest_first() -> None:
    noted = Loads()
    noted.note("m", 0, running=1, queued=0, ready=1)
    noted.note("m", 2000, running=2, queued=3, ready=1)
    assert noted.samples("m", 2500) == (
        Load(age_ms=500, running=2, queued=3, ready=1),
        Load(age_ms=2500, running=1, queued=0, ready=1),
    )
    noted.forget("m")
    assert noted.samples("m", 2500) == ()


def test_the_newest_sample_is_always_the_latest_and_the_others_stay_bounded_and_cover_the_windows() -> None:
    noted = Loads()
    for now_ms in range(0, 200_000, 50):
        noted.note("m", now_ms, running=now_ms, queued=0, ready=1)
        assert noted.samples("m", now_ms)[0] == Load(age_ms=0, running=now_ms, queued=0, ready=1)
    ages = [s.age_ms for s in noted.samples("m", now_ms)]
    assert len(ages) <= HORIZON_MS // loads.SPACING_MS + 3
    assert ages[-1] >= HORIZON_MS
    assert all(older - newer >= loads.SPACING_MS for newer, older in pairwise(ages[1:]))


def test_a_model_that_is_seldom_noted_still_tells_what_held_at_the_horizon() -> None:
    noted = Loads()
    noted.note("m", 0, running=4, queued=0, ready=1)
    noted.note("m", 500_000, running=0, queued=0, ready=1)
    noted.note("m", 510_000, running=0, queued=0, ready=1)
    assert [s.running for s in noted.samples("m", 510_000)] == [0, 0, 4]


def test_the_models_that_are_noted_are_bounded() -> None:
    noted = Loads()
    for index in range(loads.MODELS_MAX):
        noted.note(f"m{index}", index, running=1, queued=0, ready=0)
    for model_id in ("m0", "new"):
        noted.note(model_id, loads.MODELS_MAX, running=1, queued=0, ready=0)
    assert noted.samples("m0", loads.MODELS_MAX) != ()
    assert noted.samples("m1", loads.MODELS_MAX) == ()
    assert noted.samples("m2", loads.MODELS_MAX) != ()

"""How long an idle model stays and when it is wanted again."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_policy.idle import (
    EDGES_S,
    FORECAST_SAMPLES,
    IDLES_MAX,
    KEEP_ALIVE_MAX_S,
    LINGER_S,
    MODELS_MAX,
    PREWARM_MIN_S,
    SAMPLES_MIN,
    IdleTimes,
    Window,
    forecast,
    spread,
)

many = settings(max_examples=60, deadline=None)
HOUR_S = 3600.0
RANGE_S = EDGES_S[-1]
STANDARD = Window(prewarm_s=0.0, keep_alive_s=60.0, basis="standard")
some_idles = st.lists(
    st.one_of(st.floats(0, 1e9), st.sampled_from((0.0, 0.01, 1.0, 30.0, HOUR_S, RANGE_S, 8 * HOUR_S))), max_size=60
)


def learned(idles_s: list[float], **options: float) -> IdleTimes:
    idle = IdleTimes(**options)
    for idle_s in idles_s:
        idle.observe("m", idle_s)
    return idle


def window(idles_s: list[float], default_keep_alive_s: float = 60.0, **options: float) -> Window:
    return learned(idles_s, **options).window("m", default_keep_alive_s)


def poisson(mean_s: float, count: int = 200) -> list[float]:
    """Idle times as Poisson arrivals give them, the same in every run."""
    chance = random.Random(7)
    return [chance.expovariate(1 / mean_s) for _ in range(count)]


def test_a_model_never_seen_is_kept_as_its_options_say() -> None:
    assert IdleTimes().window("m", 60.0) == STANDARD


def test_few_idle_times_say_nothing_yet() -> None:
    assert window([HOUR_S] * (SAMPLES_MIN - 1)) == STANDARD
    assert window([HOUR_S] * SAMPLES_MIN).basis == "histogram"


def test_a_model_asked_every_hour_is_prewarmed_shortly_before_and_leaves_its_device_meanwhile() -> None:
    found = window([HOUR_S + jitter_s for jitter_s in (-20, -10, 0, 10, 20) * 5])
    assert found.basis == "histogram"
    assert 0.8 * HOUR_S < found.prewarm_s < HOUR_S - 20
    assert HOUR_S + 20 < found.end_s < 1.25 * HOUR_S
    assert not found.stays(600)
    assert found.stays(HOUR_S)
    assert found.warm(HOUR_S)
    assert not found.warm(2 * HOUR_S)


def test_head_and_tail_are_rounded_outwards_and_get_a_margin() -> None:
    found = window([2000.0] * 10 + [3000.0] * 10)
    assert found.prewarm_s == pytest.approx(0.9 * max(edge_s for edge_s in EDGES_S if edge_s <= 2000))
    assert found.end_s == pytest.approx(1.1 * min(edge_s for edge_s in EDGES_S if edge_s > 3000))


def test_a_window_follows_what_came_since_it_was_asked_for() -> None:
    idle = learned([5.0] * SAMPLES_MIN)
    before = idle.window("m", 60.0)
    for _ in range(SAMPLES_MIN):
        idle.observe("m", 500.0)
    assert idle.window("m", 60.0).end_s > 500 > before.end_s


def test_a_conversation_is_never_interrupted_between_its_turns() -> None:
    found = window([float(s) for s in range(5, 35)] * 3)
    assert found.prewarm_s == 0
    assert 34 <= found.keep_alive_s < 60
    assert all(found.stays(s) for s in range(35))


def test_who_comes_back_at_once_is_kept_for_longer_than_a_restart_would_take() -> None:
    assert window([0.01] * 50) == Window(prewarm_s=0.0, keep_alive_s=LINGER_S, basis="histogram")


def test_an_instance_lingers_for_a_moment_even_if_it_is_wanted_only_later() -> None:
    found = window([HOUR_S] * 20)
    assert found.stays(LINGER_S)
    assert not found.stays(LINGER_S + 1)


@pytest.mark.parametrize("mean_s", [10.0, 100.0, 1000.0])
def test_poisson_arrivals_are_a_pattern_however_rare_and_the_window_covers_nearly_all(mean_s: float) -> None:
    idles_s = poisson(mean_s)
    found = window(idles_s, keep_alive_max_s=1e9)
    assert found.basis == "histogram"
    covered = sum(found.stays(s) for s in idles_s) / len(idles_s)
    assert covered >= 0.93


def test_what_is_spread_evenly_from_seconds_to_hours_is_no_pattern() -> None:
    assert window([math.sqrt(low * high) for low, high in pairwise(EDGES_S)] * 2) == STANDARD


def test_few_scattered_idle_times_do_not_look_like_a_pattern() -> None:
    assert window([2.0**k for k in range(14)]) == STANDARD


def test_a_changed_pattern_is_followed() -> None:
    changed = [HOUR_S] * IDLES_MAX + [5.0] * IDLES_MAX
    assert window(changed) == window([5.0] * IDLES_MAX)


def test_a_model_asked_every_eight_hours_is_forecast() -> None:
    found = window([8 * HOUR_S + s for s in (-600, 0, 300, 600)], keep_alive_max_s=1e9)
    assert found.basis == "forecast"
    assert found.prewarm_s == pytest.approx(0.85 * 8 * HOUR_S, rel=0.01)
    assert found.end_s == pytest.approx(1.15 * 8 * HOUR_S, rel=0.01)


def test_a_missed_turn_does_not_move_the_forecast() -> None:
    usual = [8 * HOUR_S] * 6
    assert window([*usual, 16 * HOUR_S]) == window([*usual, 8 * HOUR_S])


def test_a_forecast_is_as_wide_as_what_it_rests_on_scatters_and_none_if_that_is_everything() -> None:
    wide = forecast([s * HOUR_S for s in (5.0, 6.5, 8.0, 9.5, 11.0)])
    assert wide is not None
    assert 5.0 * HOUR_S < wide.prewarm_s < 6.5 * HOUR_S
    assert 9.5 * HOUR_S < wide.end_s < 11.0 * HOUR_S
    assert forecast([s * HOUR_S for s in (5, 6, 20, 50, 90)]) is None


def test_a_forecast_needs_more_than_three() -> None:
    assert forecast([8 * HOUR_S] * 3) is None
    assert forecast([8 * HOUR_S] * 4) is not None


def test_rare_idle_times_out_of_range_do_not_hide_the_pattern_of_the_others() -> None:
    pattern = [HOUR_S] * 30
    assert window([*pattern, *[9 * HOUR_S] * 10]) == window(pattern)


def test_recent_idle_times_decide_the_forecast() -> None:
    found = window([20 * HOUR_S] * 20 + [8 * HOUR_S] * FORECAST_SAMPLES, keep_alive_max_s=1e9)
    assert found.prewarm_s < 8 * HOUR_S < found.end_s


def test_no_keep_alive_is_above_the_bound() -> None:
    assert window(poisson(2000.0)).keep_alive_s == KEEP_ALIVE_MAX_S
    assert window([], 1e6).keep_alive_s == KEEP_ALIVE_MAX_S
    assert window([HOUR_S] * 20, keep_alive_max_s=7.0).keep_alive_s == 7.0


@pytest.mark.parametrize("idle_s", [-1.0, math.nan, math.inf, -math.inf])
def test_nonsense_is_refused_and_teaches_nothing(idle_s: float) -> None:
    idle = learned([HOUR_S] * 20)
    before = idle.dump()
    with pytest.raises(ValueError, match="idle time of m"):
        idle.observe("m", idle_s)
    assert idle.dump() == before


def test_models_are_bounded_and_the_one_heard_longest_ago_gives_way() -> None:
    idle = IdleTimes()
    for _ in range(SAMPLES_MIN):
        idle.observe("old", HOUR_S)
        idle.observe("kept", HOUR_S)
    idle.load({f"m{i}": [1000] for i in range(MODELS_MAX - 2)})
    idle.observe("kept", HOUR_S)
    idle.observe("new", 1.0)
    idle.observe("newer", 1.0)
    assert len(idle.dump()) == MODELS_MAX
    assert idle.window("old", 60.0) == STANDARD
    assert idle.window("kept", 60.0).basis == "histogram"


def test_a_forgotten_model_is_as_if_never_seen() -> None:
    idle = learned([HOUR_S] * 20)
    idle.forget("m")
    assert idle.window("m", 60.0) == STANDARD
    assert idle.dump() == {}


def test_only_the_named_models_are_dumped() -> None:
    idle = learned([1.5])
    idle.observe("n", 2.0)
    assert idle.dump(["m", "unknown"]) == {"m": [1500]}


@pytest.mark.parametrize("bad", [-1, 1.5, "7", None, True, 2**40])
def test_a_damaged_dump_is_refused_whole(bad: object) -> None:
    idle = learned([1.5])
    with pytest.raises(ValueError, match="idle time of x"):
        idle.load({"m": [9], "x": [1000, bad]})  # type: ignore[list-item]
    assert idle.dump() == {"m": [1500]}


@many
@given(some_idles, some_idles)
def test_what_was_dumped_as_json_and_loaded_goes_on_as_before(before_s: list[float], after_s: list[float]) -> None:
    first = learned(before_s)
    second = IdleTimes()
    second.load(json.loads(json.dumps(first.dump())))
    for idle in (first, second):
        for idle_s in after_s:
            idle.observe("m", idle_s)
    assert second.window("m", 60.0) == first.window("m", 60.0)
    assert second.dump() == first.dump()


@many
@given(some_idles, st.floats(0, 1e6), st.floats(0, 1e6))
def test_every_window_is_finite_bounded_and_worth_its_prewarming(
    idles_s: list[float], default_s: float, bound_s: float
) -> None:
    found = window(idles_s, default_s, keep_alive_max_s=bound_s)
    assert 0 <= found.keep_alive_s <= bound_s
    assert found.prewarm_s == 0 or PREWARM_MIN_S <= found.prewarm_s < math.inf
    if found.basis == "standard":
        assert found == Window(prewarm_s=0.0, keep_alive_s=min(default_s, bound_s), basis="standard")


@many
@given(st.lists(st.floats(1, RANGE_S - 1), min_size=SAMPLES_MIN, max_size=100))
def test_a_learned_window_covers_what_lies_between_head_and_tail(idles_s: list[float]) -> None:
    found = window(idles_s, keep_alive_max_s=1e9)
    if found.basis == "histogram":
        missed_early = sum(s < found.prewarm_s for s in idles_s)
        missed_late = sum(s > found.end_s for s in idles_s)
        assert missed_early <= 0.05 * len(idles_s)
        assert missed_late <= 0.01 * len(idles_s)


@many
@given(st.lists(st.floats(0, 1e6), max_size=80), st.randoms(use_true_random=False))
def test_the_order_of_idle_times_means_nothing_to_the_histogram(idles_s: list[float], chance: object) -> None:
    shuffled = list(idles_s)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    found = window(idles_s)
    if found.basis == "histogram":
        assert window(shuffled) == found


@many
@given(st.lists(st.integers(0, 50), min_size=2, max_size=40))
def test_spread_is_zero_for_an_even_spread_and_greatest_for_one_bin(counts: list[int]) -> None:
    total = sum(counts)
    alone = [total] + [0] * (len(counts) - 1)
    assert 0 <= spread(counts) <= spread(alone) + 1e-9
    assert spread([1] * len(counts)) == 0

"""What is learned of noisy quantities, of lines, and of lengths."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_policy.learn import (
    WINDOW_MAX,
    Absurd,
    Window,
    Windows,
    belief,
    blend,
    require,
    weighted_median,
)
from stoker_policy.lengths import LENGTHS_MAX, Lengths
from stoker_policy.line import LINE_MAX, Line, Lines

many = settings(max_examples=100, deadline=None)
noisy = st.floats(0.95, 1.05)


def window(*values: float) -> Window:
    learned = Window()
    for value in values:
        learned.add(value)
    return learned


def value_of(learned: Window) -> float:
    return learned.belief.guess.value


def line(*points: tuple[float, float]) -> Line:
    learned = Line()
    for x, y in points:
        learned.add(x, y)
    return learned


# Quantities


@many
@given(st.lists(noisy, min_size=5, max_size=40), st.integers(0, 39), st.sampled_from((100.0, 0.01)))
def test_one_observation_a_hundred_times_off_moves_the_answer_by_less_than_a_tenth(
    values: list[float], position: int, factor: float
) -> None:
    position %= len(values)
    wrong = [*values[:position], values[position] * factor, *values[position + 1 :]]
    assert value_of(window(*wrong)) == pytest.approx(value_of(window(*values)), rel=0.1)


@many
@given(st.lists(noisy, min_size=16, max_size=40), st.sampled_from((0.1, 3.0, 50.0)))
def test_a_lasting_change_is_followed_within_half_a_window(values: list[float], factor: float) -> None:
    learned = window(*values)
    for value in values[: WINDOW_MAX // 2]:
        learned.add(value * factor)
    assert value_of(learned) == pytest.approx(factor, rel=0.15)


def test_a_few_new_observations_do_not_yet_overturn_many() -> None:
    assert value_of(window(*[1.0] * WINDOW_MAX, *[5.0] * 5)) == pytest.approx(1.0)


def test_ten_times_and_a_tenth_are_equally_far() -> None:
    assert value_of(window(*[10.0, 0.1] * 16)) == pytest.approx(1.0, rel=0.35)


def test_the_spread_is_about_the_deviation_of_the_logarithm() -> None:
    normal = statistics.NormalDist(sigma=0.2)
    values = [math.exp(normal.inv_cdf((i * 7 % 31 + 0.5) / 31)) for i in range(31)]  # evenly drawn, in mixed order
    assert window(*values).belief.deviation == pytest.approx(0.2, rel=0.3)


@many
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=32))
def test_with_equal_weights_the_weighted_median_is_the_median(values: list[float]) -> None:
    assert weighted_median(values, [2.0] * len(values)) == pytest.approx(statistics.median(values), rel=1e-9, abs=1e-6)


@many
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 1)), min_size=1, max_size=32))
def test_a_weighted_median_lies_among_its_values_and_halves_their_weight(pairs: list[tuple[float, float]]) -> None:
    middle = weighted_median([value for value, _ in pairs], [weight for _, weight in pairs])
    total = sum(weight for _, weight in pairs)
    assert min(value for value, _ in pairs) <= middle <= max(value for value, _ in pairs)
    assert sum(weight for value, weight in pairs if value < middle - 1e-9) <= total / 2 + max(w for _, w in pairs)
    assert sum(weight for value, weight in pairs if value > middle + 1e-9) <= total / 2 + max(w for _, w in pairs)


def test_few_samples_lean_on_the_parent_and_many_do_not() -> None:
    parent = belief(100.0, 0.1)
    answers = [blend(parent, window(*[10.0] * n).belief).guess.value for n in (1, 2, 4, 30)]
    assert answers == sorted(answers, reverse=True)
    assert answers[0] > 30
    assert answers[-1] == pytest.approx(10, rel=0.2)


def test_a_parent_whose_keys_differ_is_leant_on_less() -> None:
    own = window(10.0, 10.0).belief
    assert blend(belief(100.0, 1.0), own).guess.value < blend(belief(100.0, 0.1), own).guess.value


def test_samples_that_disagree_lean_on_the_parent() -> None:
    agree, disagree = window(10.0, 10.0).belief, window(1.0, 100.0).belief
    assert blend(belief(50.0, 0.5), disagree).guess.value > 2 * blend(belief(50.0, 0.5), agree).guess.value


def test_a_key_without_samples_is_its_parent_but_less_certain() -> None:
    parent = belief(100.0, 0.5)
    borrowed = blend(parent, None).guess
    assert borrowed.value == pytest.approx(100.0)
    assert borrowed.spread > 0.5
    assert borrowed.samples == 0


def test_agreeing_samples_make_it_more_certain() -> None:
    prior = belief(1.0, 1.0)
    spreads = [blend(prior, window(*[1.0, 1.02] * n).belief).guess.spread for n in (1, 3, 10)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.3


def test_the_keys_observed_longest_ago_are_forgotten_first() -> None:
    windows = Windows(keys_max=3)
    for key in "abcad":
        windows.observe([key], 1.0)
    assert len(windows) == 3
    assert [key for key in "abcd" if windows.get(key)] == ["a", "c", "d"]
    lines = Lines(keys_max=2)
    for key in "aba":
        lines.observe([key], 1.0, 1.0)
    lines.observe("c", 1.0, 1.0)
    assert [key for key in "abc" if lines.get(key)] == ["a", "c"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 10.1])
def test_nonsense_is_refused_with_what_and_how_much(value: float) -> None:
    with pytest.raises(Absurd) as refused:
        require("load_s", value, 10.0)
    assert refused.value.what == "load_s"
    assert refused.value.limit == 10.0


def test_what_is_possible_is_not_refused() -> None:
    require("load_s", 10.0, 10.0)
    require("load_s", 0.0, 10.0, zero=True)


# Lines

slopes, constants = st.floats(0.001, 10), st.floats(0, 10)


@many
@given(slopes, constants, st.lists(st.integers(1, 1000), min_size=3, max_size=LINE_MAX, unique=True))
def test_a_line_through_exact_points_is_found(slope: float, constant: float, xs: list[int]) -> None:
    learned = line(*[(x, slope * x + constant) for x in xs])
    if max(xs) > 1.25 * min(xs):
        assert learned.fit(1.0, 1.0) == pytest.approx((slope, constant), rel=1e-6, abs=1e-6)


@many
@given(slopes, constants, st.integers(0, 7), st.sampled_from((0.01, 100.0)))
def test_one_wrong_point_does_not_turn_a_line(slope: float, constant: float, wrong: int, factor: float) -> None:
    points = [(x, (slope * x + constant) * (factor if i == wrong else 1)) for i, x in enumerate(range(10, 90, 10))]
    found_slope, found_constant = line(*points).fit(1.0, 1.0)
    assert found_slope * 50 + found_constant == pytest.approx(slope * 50 + constant, rel=0.1)


@many
@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(1e-4, 1e5)), min_size=1, max_size=20))
def test_neither_slope_nor_constant_is_ever_negative(points: list[tuple[float, float]]) -> None:
    slope, constant = line(*points).fit(0.01, 0.1)
    assert slope >= 0
    assert constant >= 0


def test_points_at_one_place_only_scale_the_parent() -> None:
    assert line((100, 2.2), (100, 2.2), (100, 2.2)).fit(0.01, 0.1) == pytest.approx((0.02, 0.2))
    assert line().fit(0.01, 0.1) == (0.01, 0.1)


def test_a_line_follows_a_lasting_change() -> None:
    learned = line(*[(x, 0.01 * x + 0.1) for x in range(100, 1700, 100)])
    for x in range(100, 1300, 100):
        learned.add(x, 0.05 * x + 0.3)
    assert learned.fit(1.0, 1.0) == pytest.approx((0.05, 0.3), rel=0.1)


# Lengths


def test_what_is_left_is_the_mean_over_those_that_came_further() -> None:
    lengths = Lengths()
    for length in (10, 30, 50, 90):
        lengths.add(length)
    assert lengths.left(0).guess.value == pytest.approx(45)  # type: ignore[union-attr]
    assert lengths.left(30).guess.value == pytest.approx(40)  # type: ignore[union-attr]
    assert lengths.left(30).samples == 2  # type: ignore[union-attr]
    assert lengths.left(90) is None


@many
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=600), st.integers(0, 5000))
def test_only_the_newest_lengths_count(values: list[int], so_far: int) -> None:
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    longer = [value - so_far for value in values[-LENGTHS_MAX:] if value > so_far]
    left = lengths.left(so_far)
    if longer:
        assert left is not None
        assert left.guess.value == pytest.approx(statistics.fmean(longer))
    else:
        assert left is None

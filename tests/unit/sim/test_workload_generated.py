"""Requests drawn from a seed: their statistics hold, and the same seed gives the same requests."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from statistics import fmean, median, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_core.errors import InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload import (
    GSM8K_LIKE,
    SHAREGPT_LIKE,
    Arrival,
    Clipped,
    LogNormalLengths,
    Popularity,
    azure_shaped,
    bursts,
    bursts_of_each,
    even,
    shuffled,
    zipf,
)
from stoker_sim.workload.bulk import BulkDice
from stoker_sim.workload.bursts import times
from stoker_sim.workload.draws import gamma, normal

MODELS = [f"m{index}" for index in range(20)]


def cv(values: Sequence[float]) -> float:
    return pstdev(values) / fmean(values)


def gaps(at_s: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(at_s)]


def made(generate: Callable[..., Iterator[Arrival]] = bursts, seed: int = 1, **other: object) -> list[Arrival]:
    options: dict[str, object] = {
        "popularity": zipf(MODELS, 1.0),
        "lengths": GSM8K_LIKE,
        "rate_per_s": 2.0,
        "cv": 4.0,
        "duration_s": 300.0,
    }
    return list(generate(Dice(seed), **(options | other)))


def shaped(seed: int = 1, models: int = 500, arrivals: int = 20_000, **other: object) -> list[Arrival]:
    names = [f"m{index:03}" for index in range(models)]
    options: dict[str, object] = {"lengths": GSM8K_LIKE, "duration_s": 600.0}
    return list(azure_shaped(Dice(seed), models=names, arrivals=arrivals, **(options | other)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("burstiness", "within"), [(0.5, 0.03), (1.0, 0.05), (8.0, 0.12)])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(burstiness: float, within: float) -> None:
    drawn = gaps(list(islice(times(Dice(11), rate_per_s=5.0, cv=burstiness), 60_000)))
    assert 1 / fmean(drawn) == pytest.approx(5.0, rel=within)
    assert cv(drawn) == pytest.approx(burstiness, rel=within)


def test_a_bursty_stream_does_not_begin_with_a_burst() -> None:
    """Over many seeds a short look sees the rate that was asked for; 31 requests too many, were each to begin a burst."""

    def seen(seed: int) -> int:
        return next(n for n, at_s in enumerate(times(Dice(seed), rate_per_s=1.0, cv=8.0)) if at_s >= 10.0)

    assert fmean(seen(seed) for seed in range(3000)) == pytest.approx(10.0, abs=3.0)


@pytest.mark.parametrize("generate", [bursts, bursts_of_each])
def test_the_same_seed_gives_the_same_requests_and_another_gives_others(
    generate: Callable[..., Iterator[Arrival]],
) -> None:
    assert made(generate) == made(generate) != made(generate, seed=2)


@pytest.mark.parametrize("generate", [bursts, bursts_of_each])
def test_other_lengths_move_neither_times_nor_models(generate: Callable[..., Iterator[Arrival]]) -> None:
    one, other = made(generate), made(generate, lengths=SHAREGPT_LIKE)
    assert [(a.at_s, a.model) for a in one] == [(a.at_s, a.model) for a in other]
    assert [a.prompt_tokens for a in one] != [a.prompt_tokens for a in other]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([bursts, bursts_of_each]), st.floats(0.1, 16.0))
def test_requests_come_in_order_within_the_duration(
    seed: int, generate: Callable[..., Iterator[Arrival]], burstiness: float
) -> None:
    moments = [a.at_s for a in made(generate, seed, cv=burstiness, duration_s=60.0)]
    assert moments == sorted(moments)
    assert all(0.0 <= at_s < 60.0 for at_s in moments)


def test_each_models_bursts_are_its_own() -> None:
    read = made(bursts_of_each, popularity=even(MODELS), rate_per_s=200.0, cv=4.0)
    moments: dict[str, list[float]] = defaultdict(list)
    for arrival in read:
        moments[arrival.model].append(arrival.at_s)
    assert fmean(cv(gaps(one)) for one in moments.values()) == pytest.approx(4.0, rel=0.15)
    assert len(read) == pytest.approx(200.0 * 300.0, rel=0.1)
    # Together twenty independent ones are smoother than each.
    assert cv(gaps([a.at_s for a in read])) < 3.0


def test_zipf_makes_the_first_model_as_much_more_popular_as_its_exponent_says() -> None:
    popularity, dice = zipf(MODELS, 1.2), Dice(5)
    drawn = Counter(popularity.draw(dice) for _ in range(40_000))
    assert drawn["m0"] / drawn["m1"] == pytest.approx(2**1.2, rel=0.06)
    assert drawn["m0"] / drawn["m9"] == pytest.approx(10**1.2, rel=0.15)
    assert sum(popularity.shares) == pytest.approx(1.0)


def test_shuffling_keeps_every_model_and_follows_the_seed() -> None:
    one = shuffled(MODELS, Dice(1))
    assert sorted(one) == sorted(MODELS)
    assert MODELS != one == shuffled(MODELS, Dice(1)) != shuffled(MODELS, Dice(2))


@pytest.mark.parametrize(
    ("lengths", "medians", "p95", "most"),
    [(SHAREGPT_LIKE, (1630, 417), (7102, 953), (8141, 1024)), (GSM8K_LIKE, (49, 60), (89, 129), (178, 278))],
)
def test_built_in_lengths_are_what_they_say(
    lengths: LogNormalLengths, medians: tuple[int, int], p95: tuple[int, int], most: tuple[int, int]
) -> None:
    dice = Dice(7)
    drawn = [lengths.draw(dice) for _ in range(20_000)]
    for side in (0, 1):
        values = sorted(pair[side] for pair in drawn)
        assert median(values) == pytest.approx(medians[side], rel=0.05)
        assert values[19_000] == pytest.approx(p95[side], rel=0.05)
        assert values[0] >= 1
        assert values[-1] <= most[side]


def test_long_questions_get_long_answers_as_far_as_they_are_correlated() -> None:
    dice = Dice(9)
    logs = [(math.log(prompt), math.log(output)) for prompt, output in (GSM8K_LIKE.draw(dice) for _ in range(20_000))]
    xs, ys = zip(*logs, strict=True)
    covariance = fmean(x * y for x, y in logs) - fmean(xs) * fmean(ys)
    assert covariance / pstdev(xs) / pstdev(ys) == pytest.approx(0.53, abs=0.03)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 10_000))
def test_clipped_lengths_fit_the_context(seed: int, context: int) -> None:
    dice, lengths = Dice(seed), Clipped(SHAREGPT_LIKE, context)
    for _ in range(20):
        prompt, output = lengths.draw(dice)
        assert prompt >= 1
        assert output >= 1
        assert prompt + output <= context


@pytest.mark.parametrize("shape", [1 / 64, 0.5, 1.0, 7.0])
def test_gamma_variables_have_their_mean_and_variance_one_by_one_and_in_bulk(shape: float) -> None:
    import numpy as np

    dice, count = Dice(3), 60_000
    singly = [gamma(dice, shape) for _ in range(count)]
    together = np.exp(BulkDice(dice).log_gammas(np.full(count, shape))).tolist()
    for drawn in (singly, together):
        assert fmean(drawn) == pytest.approx(shape, rel=0.12)
        assert pstdev(drawn) ** 2 == pytest.approx(shape, rel=0.2)


def test_normal_variables_are_standard_one_by_one_and_in_bulk() -> None:
    dice = Dice(4)
    for drawn in ([normal(dice) for _ in range(20_000)], BulkDice(dice).normals(20_000).tolist()):
        assert fmean(drawn) == pytest.approx(0.0, abs=0.03)
        assert pstdev(drawn) == pytest.approx(1.0, abs=0.03)
        assert sum(1 for x in drawn if x < -1.0) / 20_000 == pytest.approx(0.1587, abs=0.01)


def test_azure_shaped_requests_are_as_many_as_were_asked_for_in_order_within_the_duration() -> None:
    read = shaped()
    moments = [a.at_s for a in read]
    assert len(read) == 20_000
    assert moments == sorted(moments)
    assert moments[0] >= 0.0
    assert moments[-1] < 600.0


def test_azure_shaped_models_with_one_request_have_it_anywhere() -> None:
    by_minute = Counter(int(a.at_s // 60) for a in shaped(models=3000, arrivals=3000, spread=0.0))
    assert sorted(by_minute) == list(range(10))
    assert all(abs(number - 300) < 70 for number in by_minute.values())


def test_azure_shaped_requests_follow_their_seed() -> None:
    assert shaped() == shaped() != shaped(seed=2)


def test_azure_shaped_popularity_has_a_heavy_tail_that_no_model_order_tells() -> None:
    counts = Counter(a.model for a in shaped())
    ordered = [number for _, number in counts.most_common()]
    assert sum(ordered[:93]) / 20_000 > 0.95  # 18.6 % of the models
    assert ordered[0] / 20_000 < 0.5
    assert len(counts) < 500
    first_half = sum(number for model, number in counts.items() if model < "m250")
    assert 0.02 < first_half / 20_000 < 0.98


def test_azure_shaped_rates_are_alike_where_no_spread_is_asked_for() -> None:
    assert set(Counter(a.model for a in shaped(spread=0.0)).values()) == {40}


def test_azure_shaped_models_differ_in_burstiness() -> None:
    moments: dict[str, list[float]] = defaultdict(list)
    for arrival in shaped(models=100, arrivals=40_000, spread=0.0):
        moments[arrival.model].append(arrival.at_s)
    seen = sorted(cv(gaps(one)) for one in moments.values())
    assert seen[10] < 1.0
    assert median(seen) == pytest.approx(1.6, rel=0.3)
    assert seen[-10] > 3.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: made(rate_per_s=0.0),
        lambda: made(rate_per_s=math.nan),
        lambda: made(cv=0.0),
        lambda: made(cv=math.inf),
        lambda: made(duration_s=math.inf),
        lambda: made(bursts_of_each, duration_s=-1.0),
        lambda: shaped(models=0),
        lambda: shaped(arrivals=0),
        lambda: shaped(arrivals=10**9),
        lambda: shaped(duration_s=0.0),
        lambda: shaped(spread=math.nan),
        lambda: even([]),
        lambda: Popularity(["a", "b"], [1.0]),
        lambda: Popularity(["a"], [0.0]),
        lambda: zipf(MODELS, -1.0),
        lambda: zipf(MODELS, math.nan),
        lambda: Clipped(GSM8K_LIKE, 1),
    ],
)
def test_a_workload_that_cannot_be_made_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(InvalidWorkload):
        wrong()


def test_numpy_is_not_imported_until_it_is_needed() -> None:
    code = "import sys, stoker_sim.workload; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

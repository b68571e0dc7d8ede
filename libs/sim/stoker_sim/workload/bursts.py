"""Requests whose gaps are gamma distributed: the higher their coefficient of variation, the burstier."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from stoker_core.errors import InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload.arrival import Arrival
from stoker_sim.workload.draws import gamma, unit_open
from stoker_sim.workload.lengths import Lengths
from stoker_sim.workload.popularity import Popularity

CV_MIN, CV_MAX = 0.05, 32.0
DURATION_S_MAX = 366 * 24 * 3600.0


def times(dice: Dice, *, rate_per_s: float, cv: float) -> Iterator[float]:
    """Seconds from 0, without end. cv: standard deviation of a gap ÷ its mean; 1 is Poisson, 8 a shape of 1/64.

    The process has always been running when it is first looked at: the first gap is what is left of a gap that began before.
    Without that a bursty one would begin with a burst every time, of about (cv² - 1) / 2 requests too many.
    Raises InvalidWorkload.
    Source: Cox, "Renewal Theory", 1962, ch. 5: what is left is a uniform share of a gap picked by its length, and that one is
    gamma distributed too, its shape higher by 1.
    """
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise InvalidWorkload(f"a rate of {rate_per_s:g} requests per second is none")
    if not CV_MIN <= cv <= CV_MAX:
        raise InvalidWorkload(f"a coefficient of variation of {cv:g} is not from {CV_MIN:g} to {CV_MAX:g}")
    shape = 1.0 / cv**2
    scale_s = 1.0 / (rate_per_s * shape)
    at_s = unit_open(dice) * gamma(dice, shape + 1.0) * scale_s
    while True:
        yield at_s
        at_s += gamma(dice, shape) * scale_s


def bursts(
    dice: Dice, *, popularity: Popularity, lengths: Lengths, rate_per_s: float, cv: float, duration_s: float
) -> Iterator[Arrival]:
    """One stream of bursts, each request's model drawn by popularity. Raises InvalidWorkload.

    Times, models and lengths are drawn from streams of their own: with other lengths, times and models stay.
    """
    _check_duration(duration_s)
    models, tokens = dice.child("models"), dice.child("lengths")
    for at_s in times(dice.child("times"), rate_per_s=rate_per_s, cv=cv):
        if at_s >= duration_s:
            return
        yield _arrival(at_s, popularity.draw(models), lengths, tokens)


def bursts_of_each(
    dice: Dice, *, popularity: Popularity, lengths: Lengths, rate_per_s: float, cv: float, duration_s: float
) -> Iterator[Arrival]:
    """Every model has bursts of its own, at its share of the rate. At one moment models come in the popularity's order.

    Raises InvalidWorkload.
    """
    _check_duration(duration_s)

    def one(index: int, model: str, share: float) -> Iterator[tuple[float, int]]:
        for at_s in times(dice.child(f"times/{model}"), rate_per_s=rate_per_s * share, cv=cv):
            if at_s >= duration_s:
                return
            yield at_s, index

    tokens = dice.child("lengths")
    streams = [one(i, *m) for i, m in enumerate(zip(popularity.models, popularity.shares, strict=True))]
    for at_s, index in heapq.merge(*streams):
        yield _arrival(at_s, popularity.models[index], lengths, tokens)


def _arrival(at_s: float, model: str, lengths: Lengths, dice: Dice) -> Arrival:
    prompt_tokens, output_tokens = lengths.draw(dice)
    return Arrival(at_s=at_s, model=model, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _check_duration(duration_s: float) -> None:
    if not 0 < duration_s <= DURATION_S_MAX:
        raise InvalidWorkload(f"a workload of {duration_s:g} s is not from 0 to {DURATION_S_MAX:g}")

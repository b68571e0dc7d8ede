"""Distributions drawn from a `Dice`."""

from __future__ import annotations

import math
from statistics import NormalDist

from stoker_sim.dice import Dice

STANDARD = NormalDist()

_CELLS = 1 << 52


def unit_open(dice: Dice) -> float:
    """Above 0 and below 1, so that it has a logarithm and a normal quantile."""
    return (dice.below(_CELLS) + 0.5) / _CELLS


def normal(dice: Dice) -> float:
    """Mean 0, standard deviation 1; one draw."""
    return STANDARD.inv_cdf(unit_open(dice))


def gamma(dice: Dice, shape: float) -> float:
    """Mean and variance `shape`. A shape far below 1 gives values so small that they are 0.

    Source: Marsaglia, Tsang, "A Simple Method for Generating Gamma Variables", ACM TOMS 26(3), 2000; shapes below 1 by its
    section 6.
    """
    if shape < 1.0:
        return float(gamma(dice, shape + 1.0) * unit_open(dice) ** (1.0 / shape))
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:  # at least 19 of 20 tries are accepted
        x = normal(dice)
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(unit_open(dice)) < 0.5 * x * x + d - d * v + d * math.log(v):
            return d * v

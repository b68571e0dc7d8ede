"""Which model a request asks for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from stoker_core.errors import InvalidWorkload
from stoker_sim.dice import Dice

EXPONENT_MAX = 20.0


class Popularity:
    """Models, and how often each is asked for beside the others."""

    def __init__(self, models: Sequence[str], weights: Sequence[float]) -> None:
        """Raises InvalidWorkload if there is no model, or a weight is not a number above 0."""
        if not models or len(models) != len(weights):
            raise InvalidWorkload(f"{len(models)} models cannot have {len(weights)} weights")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InvalidWorkload("a model's weight must be a number above 0")
        self.models = tuple(models)
        total = math.fsum(weights)
        self.shares = tuple(weight / total for weight in weights)
        self._edges = list(accumulate(self.shares))

    def draw(self, dice: Dice) -> str:
        # Rounding may leave the last edge below 1.
        return self.models[min(bisect_right(self._edges, dice.unit()), len(self.models) - 1)]


def even(models: Sequence[str]) -> Popularity:
    """All as often."""
    return Popularity(models, [1.0] * len(models))


def zipf(models: Sequence[str], exponent: float) -> Popularity:
    """The first is asked for most, the one at place r by r ** -exponent as often. For an order by chance see `shuffled`.

    Raises InvalidWorkload if the exponent is not from 0 to EXPONENT_MAX.
    """
    if not 0 <= exponent <= EXPONENT_MAX:
        raise InvalidWorkload(f"a Zipf exponent of {exponent:g} is not from 0 to {EXPONENT_MAX:g}")
    return Popularity(models, [float(rank**-exponent) for rank in range(1, len(models) + 1)])


def shuffled(models: Sequence[str], dice: Dice) -> list[str]:
    """The same in an order drawn by chance. Source: Fisher and Yates, as in Knuth's Algorithm P."""
    dealt = list(models)
    for last in range(len(dealt) - 1, 0, -1):
        other = dice.below(last + 1)
        dealt[last], dealt[other] = dealt[other], dealt[last]
    return dealt

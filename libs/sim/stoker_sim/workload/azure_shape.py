"""A load test's requests: many models, most of them rare, each bursty in its own way, as Azure's functions are.

Both distributions are fitted to the counts per minute of 200 functions of Azure's trace of 2019 over a day. The logarithm of a
function's calls has a standard deviation of 3.2 there. Variance ÷ mean of a function's calls in a minute, which for long
enough a time is a gap's coefficient of variation squared, is 1.0, 2.4, 12.7 and 39 at its 25th, 50th, 75th and 90th percentile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stoker_core.errors import InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload.arrival import Arrival
from stoker_sim.workload.bulk import BulkDice
from stoker_sim.workload.draws import STANDARD
from stoker_sim.workload.lengths import Lengths

if TYPE_CHECKING:
    from stoker_sim.workload.bulk import Floats, Whole

ARRIVALS_MAX = 20_000_000
"""About 100 bytes each are in use while times are drawn, and 16 afterwards."""
SPREAD = 3.2
"""Standard deviation of the logarithm of a model's rate."""
CV_MEDIAN, CV_SPREAD, CV_MIN, CV_MAX = 1.6, 1.1, 0.5, 8.0
"""Coefficients of variation of a model's gaps are log-normal, held within these bounds: beyond them lie timers, and the few that
are burstier still (30 at the 99th percentile)."""

_BLOCK = 1 << 16


def azure_shaped(
    dice: Dice, *, models: Sequence[str], arrivals: int, duration_s: float, lengths: Lengths, spread: float = SPREAD
) -> Iterator[Arrival]:
    """Exactly so many arrivals within duration_s. Which models are popular and which are bursty is drawn by chance.

    At spread 3.2 the most popular of 10,000 models gets 18 % of all requests, the rarer half together
    less than 1 in 1,000.
    Raises InvalidWorkload.
    """
    if not models or not 1 <= arrivals <= ARRIVALS_MAX:
        raise InvalidWorkload(f"{arrivals:,} arrivals at {len(models):,} models: at least 1 each, at most {ARRIVALS_MAX:,} arrivals")  # fmt: skip
    if not (duration_s > 0 and math.isfinite(duration_s) and 0 <= spread <= 10):
        raise InvalidWorkload(f"a duration of {duration_s:g} s or a spread of {spread:g} cannot be made")
    import numpy as np

    bulk = BulkDice(dice.child("times"))
    numbers = _numbers(bulk, len(models), arrivals, spread)
    cvs = np.clip(CV_MEDIAN * np.exp(CV_SPREAD * bulk.normals(len(models))), CV_MIN, CV_MAX)
    asked = np.flatnonzero(numbers)
    owners = np.repeat(asked, numbers[asked])
    times_s = _times(bulk, numbers[asked], 1.0 / cvs[asked] ** 2) * duration_s
    order = np.argsort(times_s, kind="stable")  # at one moment models come in their order
    times_s, owners = times_s[order], owners[order].astype(np.uint32)
    del order
    tokens = dice.child("lengths")
    for begin in range(0, arrivals, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        for at_s, owner in zip(times_s[block].tolist(), owners[block].tolist(), strict=True):
            prompt_tokens, output_tokens = lengths.draw(tokens)
            yield Arrival(at_s=at_s, model=models[owner], prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _numbers(bulk: BulkDice, models: int, arrivals: int, spread: float) -> Whole:
    """How many arrivals each model gets. Rates are log-normal, one from each of as many equal parts of that distribution.

    Sums to arrivals; each is its expectation rounded up or down, by chance and without bias (systematic sampling).
    """
    import numpy as np

    normals = np.array([STANDARD.inv_cdf((index + 0.5) / models) for index in range(models)])
    rates = np.exp(spread * normals)[np.argsort(bulk.units(models), kind="stable")]
    edges = np.floor(np.cumsum(rates / rates.sum()) * arrivals + bulk.units(1)[0]).astype(np.int64)
    edges[-1] = arrivals  # whatever the sum was rounded to
    return np.diff(np.minimum(edges, arrivals), prepend=0)


def _times(bulk: BulkDice, numbers: Whole, shapes: Floats) -> Floats:
    """From 0 to 1, model by model: as many as numbers say, at gamma distributed gaps on a circle that is turned by chance.

    On a circle a model with one arrival has it anywhere, and none begins with a burst.
    """
    import numpy as np

    owners = np.repeat(np.arange(len(numbers)), numbers)
    begins = np.cumsum(numbers) - numbers
    logs = bulk.log_gammas(shapes[owners])
    # The longest gap becomes 1: those of small shapes are otherwise all 0.
    gaps = np.exp(logs - np.maximum.reduceat(logs, begins)[owners])
    reached = np.cumsum(gaps)
    before = (reached[begins] - gaps[begins])[owners]
    along = (reached - before) / np.add.reduceat(gaps, begins)[owners]
    return np.asarray((along + bulk.units(len(numbers))[owners]) % 1.0)

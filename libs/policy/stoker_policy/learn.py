"""Learning positive quantities, such as rates and durations, from few, noisy and sometimes wrong observations.

All of it is online, bounded and deterministic: the same observations in the same order give the same answers, and asking
changes nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence

import msgspec

WINDOW_MAX = 32
"""Newest observations of one quantity that count."""
HALF_LIFE = 12.0
"""An observation weighs half as much as one that came so many later. So 10 new ones out of a full window outvote the 22 before."""
KEYS_MAX = 32_768
"""Quantities remembered in one table; the one observed longest ago goes first."""
NOISE_SPREAD = 0.4
"""How far observations of one key lie apart, as Guess.spread, before they show it themselves; worth one fresh observation."""
BORROWED_SPREAD = 0.2
"""How far a key may lie from what others like it gave, at least."""

_WEIGHTS = tuple(2.0 ** (-age / HALF_LIFE) for age in range(WINDOW_MAX))
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Absurd(ValueError):
    """An observation cannot be true: not finite, negative, of nothing, or beyond what is physically possible."""

    def __init__(self, what: str, value: float, limit: float) -> None:
        self.what, self.value, self.limit = what, value, limit
        super().__init__(f"{what} is {value:g}; it must be finite, positive and at most {limit:g}")


def require(what: str, value: float, limit: float, *, zero: bool = False) -> None:
    """Raises Absurd unless 0 < value ≤ limit; with `zero`, unless 0 ≤ value ≤ limit."""
    if not (math.isfinite(value) and value <= limit and (value > 0 or (zero and value == 0))):
        raise Absurd(what, value, limit)


class Guess(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A quantity that was learned. value: in the unit of what asked.  samples: observations of exactly this.

    spread: standard deviation of ln(value), for the next observation: 0.1 is about ±10 %. With no samples it is a prior,
    or what others like it gave.
    """

    value: float
    spread: float
    samples: int = 0


class Belief(msgspec.Struct, frozen=True, gc=False):
    """A Guess in the making. location, deviation: of ln(value).  weight: in fresh observations.  samples: as Guess's."""

    location: float
    deviation: float
    weight: float = 0.0
    samples: int = 0

    @property
    def guess(self) -> Guess:
        return Guess(value=math.exp(self.location), spread=self.deviation, samples=self.samples)


def belief(value: float, spread: float, *, weight: float = 0.0) -> Belief:
    return Belief(math.log(value), spread, weight)


def blend(parent: Belief, own: Belief | None) -> Belief:
    """What is known of a key that leans on a coarser one; the more so, the fewer and the less agreeing its own observations are.

    parent: its deviation says how far keys below it lie apart.  own: the key's observations; None: there are none.
    Source: posterior of a normal mean in a hierarchy; Gelman et al., "Bayesian Data Analysis", chapter 5.
    """
    parent_variance = parent.deviation**2 + BORROWED_SPREAD**2
    if own is None:
        return Belief(parent.location, math.sqrt(parent_variance))
    noise_variance = (own.weight * own.deviation**2 + NOISE_SPREAD**2) / (own.weight + 1)
    mean_variance = noise_variance / own.weight
    share = parent_variance / (parent_variance + mean_variance)
    location = share * own.location + (1 - share) * parent.location
    # The next observation: as far from the mean as the others, and the mean from where it is thought to be.
    return Belief(location, math.sqrt(noise_variance + share * mean_variance), 0.0, own.samples)


class Window:
    """The newest WINDOW_MAX observations of one positive quantity, newer ones weighing more.

    Location is their weighted median in log space, so that a tenth and ten times are equally far; the deviation is that of their
    weighted median absolute deviation. Fewer than half of the weight, however wrong, cannot carry either away.
    Source: Hampel, "The Influence Curve and Its Role in Robust Estimation", JASA 69, 1974.
    """

    __slots__ = ("_belief", "_logs")

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW_MAX)  # newest first
        self._belief: Belief | None = None

    def add(self, value: float) -> None:
        """value: > 0 and finite."""
        self._logs.appendleft(math.log(value))
        self._belief = None

    @property
    def belief(self) -> Belief:
        """Of at least one observation."""
        if self._belief is None:
            logs = list(self._logs)
            location = weighted_median(logs, _WEIGHTS)
            away = weighted_median([abs(x - location) for x in logs], _WEIGHTS)
            weight = sum(_WEIGHTS[: len(logs)])
            self._belief = Belief(location, away * MAD_TO_DEVIATION, weight, len(logs))
        return self._belief


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Where half of the weight lies on each side, between two values in proportion. weights: > 0, at least as many as values.

    Each value stands in the middle of its own weight; equal weights give the ordinary median.
    """
    ordered = sorted(zip(values, weights, strict=False))
    half = sum(weight for _, weight in ordered) / 2
    before, below = 0.0, ordered[0][0]
    centre_below = 0.0
    for value, weight in ordered:
        centre = before + weight / 2
        if centre >= half:
            part = (half - centre_below) / (centre - centre_below)
            return below + (value - below) * part
        before, below, centre_below = before + weight, value, centre
    return below


class Windows:
    """A Window per key; at most keys_max of them."""

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._windows: OrderedDict[Hashable, Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def observe(self, keys: Iterable[Hashable], value: float) -> None:
        """The same observation, for every key that it belongs to."""
        for key in keys:
            window = self._windows.get(key)
            if window is None:
                window = self._windows[key] = Window()
            self._windows.move_to_end(key)
            window.add(value)
        while len(self._windows) > self._keys_max:
            self._windows.popitem(last=False)

    def get(self, key: Hashable) -> Belief | None:
        window = self._windows.get(key)
        return None if window is None else window.belief

    def fold(self, prior: Belief, keys: Iterable[Hashable]) -> Belief:
        """What is known of the last of `keys`, each leaning on the one before it, and the first on the prior."""
        known = prior
        for key in keys:
            known = blend(known, self.get(key))
        return known

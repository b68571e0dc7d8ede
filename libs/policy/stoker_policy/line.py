"""A straight line through few, noisy and sometimes wrong points."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from statistics import median

from stoker_policy.learn import KEYS_MAX, MAD_TO_DEVIATION

LINE_MAX = 16
"""Newest points of a line that count: its fit compares all pairs."""
_LINE_MIN = 3  # points of which a line is made; fewer only scale the parent's
_X_VARIES = 1.25  # largest ÷ smallest, below which nothing is known of a slope


def at(x: float, slope: float, constant: float) -> float:
    """y there; never nothing, so that it has a logarithm."""
    return max(slope * x + constant, 1e-9)


class Line:
    """y = slope·x + constant through the newest LINE_MAX points; both are ≥ 0, as neither costs nor times fall below nothing.

    Source: Theil, "A rank-invariant method of linear regression analysis", 1950; Sen, JASA 63, 1968: the median of the slopes of
    all pairs, then that of what they leave. Up to 29 % of the points may lie anywhere.
    """

    __slots__ = ("_fits", "_points")

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=LINE_MAX)
        self._fits: tuple[float, float] | None = None

    @property
    def samples(self) -> int:
        return len(self._points)

    @property
    def lowest(self) -> float:
        """The smallest y. Of at least one point."""
        return min(y for _, y in self._points)

    def add(self, x: float, y: float) -> None:
        """x ≥ 0, y > 0."""
        self._points.append((x, y))
        self._fits = None

    @property
    def determined(self) -> bool:
        """Whether the points say anything of a slope."""
        xs = [x for x, _ in self._points]
        return len(xs) >= _LINE_MIN and max(xs) > _X_VARIES * min(xs)

    def fit(self, slope: float, constant: float) -> tuple[float, float]:
        """Slope and constant. Given are the parent's (> 0 together), which are only scaled while points are few or all at one x."""
        if not self._points:
            return slope, constant
        if not self.determined:
            scale = math.exp(median(math.log(y / at(x, slope, constant)) for x, y in self._points))
            return slope * scale, constant * scale
        if self._fits is None:
            self._fits = self._theil_sen()
        return self._fits

    def deviation(self, slope: float, constant: float) -> float:
        """Of ln(y) from the given line. Of at least one point."""
        return MAD_TO_DEVIATION * median(abs(math.log(y / at(x, slope, constant))) for x, y in self._points)

    def _theil_sen(self) -> tuple[float, float]:
        points = sorted(self._points)
        slope = median((y - v) / (x - u) for i, (x, y) in enumerate(points) for u, v in points[:i] if x > u)
        slope = max(0.0, slope)
        constant = median(y - slope * x for x, y in points)
        if constant < 0:  # a line through the origin; one point may lie there
            return median(y / x for x, y in points if x > 0), 0.0
        return slope, constant


class Lines:
    """A Line per key; at most keys_max of them."""

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._lines: OrderedDict[Hashable, Line] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lines)

    def observe(self, keys: Iterable[Hashable], x: float, y: float) -> None:
        for key in keys:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = Line()
            self._lines.move_to_end(key)
            line.add(x, y)
        while len(self._lines) > self._keys_max:
            self._lines.popitem(last=False)

    def get(self, key: Hashable) -> Line | None:
        return self._lines.get(key)

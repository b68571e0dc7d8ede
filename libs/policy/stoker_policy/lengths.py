"""How much is left of something that has come so far, from the lengths of what ended."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate

from stoker_policy.learn import Belief

LENGTHS_MAX = 256
"""Newest lengths of one distribution that count."""


class Lengths:
    """The newest LENGTHS_MAX lengths."""

    __slots__ = ("_newest", "_ordered", "_sums")

    def __init__(self) -> None:
        self._newest: deque[int] = deque()
        self._ordered: list[int] = []
        self._sums: tuple[list[int], list[int]] | None = None  # of the first i lengths in order, and of their squares

    def add(self, length: int) -> None:
        """length: ≥ 0."""
        self._newest.append(length)
        insort(self._ordered, length)
        if len(self._newest) > LENGTHS_MAX:
            self._ordered.pop(bisect_left(self._ordered, self._newest.popleft()))
        self._sums = None

    def left(self, so_far: int) -> Belief | None:
        """The mean of what was left of those that came further than so_far; it weighs as many as they are. None: none did.

        Its deviation is that of a log-normal with the same mean and variance.
        Source: mean residual life; Guess, Proschan, "Mean Residual Life: Theory and Applications", 1988.
        """
        first = bisect_right(self._ordered, so_far)
        count = len(self._ordered) - first
        if not count:
            return None
        if self._sums is None:
            self._sums = ([0, *accumulate(self._ordered)], [0, *accumulate(x * x for x in self._ordered)])
        lengths, squares = self._sums
        whole = (lengths[-1] - lengths[first]) / count
        variance = max(0.0, (squares[-1] - squares[first]) / count - whole**2)
        mean = whole - so_far
        return Belief(math.log(mean), math.sqrt(math.log1p(variance / mean**2)), float(count), count)

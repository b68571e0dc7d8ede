"""Chance drawn from a seed: the same on every machine and in every version of Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import xxhash

T = TypeVar("T")

_UNIT = 1 << 53
LONGEST = 8.0
"""A delay is at most so many times its mean."""


class Dice:
    """A stream of draws. Streams of other names do not move when this one is drawn from."""

    def __init__(self, seed: int, name: str = "") -> None:
        self._seed, self._name = seed, name
        self._key = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())
        self._drawn = itertools.count()

    def child(self, name: str) -> Dice:
        return Dice(self._seed, f"{self._name}/{name}")

    def below(self, count: int) -> int:
        """At least 0, below `count`."""
        return self._draw() % count

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + self.below(high - low + 1)

    def unit(self) -> float:
        """At least 0, below 1."""
        return self._draw() % _UNIT / _UNIT

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice(self, among: Sequence[T]) -> T:
        return among[self.below(len(among))]

    def bytes(self, size: int) -> bytes:
        words = (self._draw().to_bytes(8, "little") for _ in range(-(-size // 8)))
        return b"".join(words)[:size]

    def delay_s(self, mean_s: float) -> float:
        """Exponential: mostly short, sometimes long."""
        return min(-math.log(1.0 - self.unit()), LONGEST) * mean_s

    def _draw(self) -> int:
        return xxhash.xxh3_64_intdigest(next(self._drawn).to_bytes(8, "little"), self._key)

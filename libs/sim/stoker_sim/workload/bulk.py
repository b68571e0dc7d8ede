"""The distributions of `draws`, many at once. numpy is imported when it is first used.

numpy's own generators are not used: their streams may change with its version. Logarithms and the like may differ in the
last bit from one processor to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker_sim.dice import Dice

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]
    Whole = NDArray[numpy.int64]

_STEP = 0x9E3779B97F4A7C15


class BulkDice:
    """A stream of arrays of draws, begun by one draw of a `Dice`.

    Source: SplitMix64, Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014: the hash of a counter.
    """

    def __init__(self, dice: Dice) -> None:
        self._key = dice.below(1 << 64)
        self._drawn = 0

    def units(self, count: int) -> Floats:
        """Above 0 and below 1."""
        import numpy as np

        counter = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64)
        self._drawn += count
        z = counter * np.uint64(_STEP) + np.uint64(self._key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normals(self, count: int) -> Floats:
        """Mean 0, standard deviation 1. Source: Box, Muller, Annals of Mathematical Statistics 29, 1958."""
        import numpy as np

        length = np.sqrt(-2.0 * np.log(self.units(count)))
        return np.asarray(length * np.cos(2.0 * np.pi * self.units(count)))

    def log_gammas(self, shapes: Floats) -> Floats:
        """Logarithms of one gamma variable for each shape: those of small shapes would be 0 without. Source: see `draws.gamma`."""
        import numpy as np

        small = shapes < 1.0
        d = np.where(small, shapes + 1.0, shapes) - 1.0 / 3.0
        c = 1.0 / np.sqrt(9.0 * d)
        logs = np.empty(len(shapes))
        waiting = np.arange(len(shapes))
        while len(waiting):  # at least 19 of 20 tries are accepted
            x, u, tried = self.normals(len(waiting)), self.units(len(waiting)), d[waiting]
            v = (1.0 + c[waiting] * x) ** 3
            log_v = np.log(np.where(v > 0.0, v, 1.0))
            accepted = (v > 0.0) & (np.log(u) < 0.5 * x * x + tried - tried * v + tried * log_v)
            logs[waiting[accepted]] = (np.log(tried) + log_v)[accepted]
            waiting = waiting[~accepted]
        return np.asarray(logs + np.where(small, np.log(self.units(len(shapes))) / shapes, 0.0))

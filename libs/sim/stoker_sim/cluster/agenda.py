"""What is going to happen, in order of time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """Virtual time in seconds, and what is due. What is due at one moment happens in the order in which it was put.

    Nothing is taken back: whoever is called looks whether it still holds.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._put = 0

    def __len__(self) -> int:
        return len(self._due)

    def at(self, at_s: float, what: Callable[[Any], None], about: Any) -> None:
        """Have `what(about)` happen then, which must not be over."""
        assert at_s >= self.now_s, f"at {self.now_s:g} s something was put for {at_s:g} s"
        self._put += 1
        heappush(self._due, (at_s, self._put, what, about))

    def step(self) -> bool:
        """Have the next thing happen; False: there is none."""
        if not self._due:
            return False
        self.now_s, _, what, about = heappop(self._due)
        what(about)
        return True

    def run_until(self, at_s: float) -> None:
        """Everything up to and at this moment, which then is now."""
        due = self._due
        while due and due[0][0] <= at_s:
            self.now_s, _, what, about = heappop(due)
            what(about)
        self.now_s = at_s

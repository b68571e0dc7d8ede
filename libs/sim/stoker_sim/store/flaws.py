"""What must not happen, and did."""

from __future__ import annotations


class Flaw(AssertionError):
    """A promise of the storage agent was broken."""


class Flaws:
    """Collected where they are seen, which may be deep in code that catches errors; raised where the world is driven."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, what: str) -> None:
        self.found.append(what)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.add(what)

    def check(self) -> None:
        if self.found:
            raise Flaw("; ".join(dict.fromkeys(self.found)))

"""What the worker needs of others, beyond the bus and the database."""

from __future__ import annotations

from typing import Protocol


class TermStore(Protocol):
    """The highest term this node ever saw; it survives the worker, so that no boot obeys a superseded leader."""

    def load(self) -> int: ...

    def save(self, term: int) -> None:
        """Returns once it is on disk."""
        ...

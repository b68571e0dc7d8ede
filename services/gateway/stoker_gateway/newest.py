"""The newest status of every node, by boot and sequence. No I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

BOOTS_REMEMBERED = 8


class Status(Protocol):
    @property
    def node(self) -> str: ...
    @property
    def boot_id(self) -> str: ...
    @property
    def seq(self) -> int: ...


S = TypeVar("S", bound=Status)


@dataclass(frozen=True)
class Seen(Generic[S]):
    status: S
    at_s: float  # monotonic, when it came


class Newest(Generic[S]):
    """A new boot replaces the old one for good: a late message of a boot that was replaced is dropped."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen[S]] = {}
        self._replaced: dict[str, deque[str]] = {}

    def offer(self, status: S, now_s: float) -> bool:
        """Whether `status` is news."""
        replaced = self._replaced.setdefault(status.node, deque(maxlen=BOOTS_REMEMBERED))
        before = self._seen.get(status.node)
        if status.boot_id in replaced:
            return False
        if before is not None and before.status.boot_id == status.boot_id and before.status.seq >= status.seq:
            return False
        if before is not None and before.status.boot_id != status.boot_id:
            replaced.append(before.status.boot_id)
        self._seen[status.node] = Seen(status, now_s)
        return True

    def get(self, node: str) -> S | None:
        seen = self._seen.get(node)
        return seen.status if seen else None

    def all(self) -> list[S]:
        """Ordered by node."""
        return [self._seen[node].status for node in sorted(self._seen)]

    def drop_silent(self, now_s: float, *, limit_s: float, link_up_since_s: float) -> list[str]:
        """Forget nodes silent for `limit_s`, counted only while the observer's own link was up. Returns their names."""
        silent = [n for n, seen in self._seen.items() if now_s - max(seen.at_s, link_up_since_s) > limit_s]
        for node in silent:
            del self._seen[node]
        return sorted(silent)

"""What one tier of a simulated node holds: whole models, the least worth keeping going first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from stoker_policy import Candidate, choose_victims

Eviction = Literal["lru", "worth"]
"""What goes first: what was used longest ago, or what is worth least by `stoker_policy.choose_victims`, as the agents have it."""


class Shelf:
    """size_bytes: its room.  refetch_bytes_per_s: at what rate it would come again, for what it is worth.

    Models in `pinned` are being read or written and stay.
    """

    def __init__(self, size_bytes: int, *, eviction: Eviction, refetch_bytes_per_s: float) -> None:
        self.size_bytes, self.used_bytes = size_bytes, 0
        self.pinned: dict[str, int] = {}
        self._eviction, self._refetch_bytes_per_s = eviction, refetch_bytes_per_s
        self._held: dict[str, tuple[int, float]] = {}  # model → size, last use; the longest unused first

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def use(self, name: str, now_s: float) -> None:
        size_bytes, _ = self._held.pop(name)
        self._held[name] = (size_bytes, now_s)

    def put(self, name: str, size_bytes: int, now_s: float) -> tuple[str, ...] | None:
        """Take a model in, and give up what has to go for it; None if it finds no room, and then nothing goes."""
        if name in self._held:
            self.use(name, now_s)
            return ()
        missing_bytes = self.used_bytes + size_bytes - self.size_bytes
        gone: tuple[str, ...] | None = ()
        if missing_bytes > 0:
            gone = self._victims(missing_bytes, now_s)
            if gone is None:
                return None
            for other in gone:
                self.used_bytes -= self._held.pop(other)[0]
        self._held[name] = (size_bytes, now_s)
        self.used_bytes += size_bytes
        assert self.used_bytes <= self.size_bytes, f"{self.used_bytes} bytes in a tier of {self.size_bytes}"
        return gone

    def pin(self, name: str) -> None:
        self.pinned[name] = self.pinned.get(name, 0) + 1

    def unpin(self, name: str) -> None:
        self.pinned[name] -= 1
        if not self.pinned[name]:
            del self.pinned[name]

    def _victims(self, need_bytes: int, now_s: float) -> tuple[str, ...] | None:
        loose = {name: held for name, held in self._held.items() if name not in self.pinned}
        if self._eviction == "worth":
            rate = self._refetch_bytes_per_s
            return choose_victims(
                (
                    Candidate(key=name, size_bytes=size, refetch_s=size / rate, idle_s=now_s - used_s)
                    for name, (size, used_s) in loose.items()
                ),
                need_bytes,
            )
        victims, free_bytes = [], 0
        for name, (size_bytes, _) in loose.items():
            if free_bytes >= need_bytes:
                break
            victims.append(name)
            free_bytes += size_bytes
        return tuple(victims) if free_bytes >= need_bytes else None


class Lane:
    """A way that bytes take, one transfer after the other: two at once would each take twice as long, and end no sooner.

    used_s: how long starts have used it in all. What is fetched ahead gives way to them, and takes that much longer.
    """

    __slots__ = ("bytes_per_s", "fetches", "free_s", "used_s")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.free_s = self.used_s = 0.0
        self.fetches = 0


def take(lanes: tuple[Lane, ...], size_bytes: float, bytes_per_s: float, now_s: float) -> tuple[float, float]:
    """Begin and end of a transfer through all of these at once, after what was put on them before."""
    begins_s = max(now_s, *(lane.free_s for lane in lanes))
    ends_s = begins_s + size_bytes / bytes_per_s
    for lane in lanes:
        lane.free_s = ends_s
        lane.used_s += ends_s - begins_s
    return begins_s, ends_s


NewsOfHeld = Callable[[str, str, bool, bool], None]
"""node, model, whether DRAM holds it, whether the SSD does."""

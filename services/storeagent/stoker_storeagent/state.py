"""What the SSD tier holds and who holds on to it; pure."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from stoker_core.errors import TierFull

RATES_KEPT = 16


@dataclass
class Entry:
    """One model in the tier. It counts as used from reservation on, and may be leased once ready."""

    model_id: str
    size_bytes: int
    ready: bool = False
    used_s: float = 0.0  # when it was last asked for


class Ledger:
    """Reservations never exceed capacity_bytes. A pinned model, or one that is being filled, is never chosen for eviction."""

    def __init__(self, tier: str, capacity_bytes: int) -> None:
        self.tier, self.capacity_bytes = tier, capacity_bytes
        self._entries: dict[str, Entry] = {}
        self._pins: Counter[str] = Counter()

    @property
    def used_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._entries.values())

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def ready(self, model_id: str) -> Entry | None:
        entry = self._entries.get(model_id)
        return entry if entry is not None and entry.ready else None

    def pins(self, model_id: str) -> int:
        return self._pins[model_id]

    def pin(self, model_id: str) -> None:
        """Keep a model, even before it is here. One unpin is owed."""
        self._pins[model_id] += 1

    def unpin(self, model_id: str) -> None:
        assert self._pins[model_id] > 0, f"{model_id} is not pinned"
        self._pins[model_id] -= 1
        if not self._pins[model_id]:
            del self._pins[model_id]

    def adopt(self, model_id: str, size_bytes: int, used_s: float) -> None:
        """A complete model that an earlier run left, whatever the capacity is now: see `excess`."""
        self._entries[model_id] = Entry(model_id, size_bytes, ready=True, used_s=used_s)

    def reserve(self, model_id: str, size_bytes: int, now_s: float) -> list[Entry]:
        """Take room for a model that will be filled. Returns what was taken out for it, least recently used first.

        Raises TierFull, changing nothing, if the room cannot be had.
        """
        assert model_id not in self._entries, f"{model_id} is here already"
        victims = self._choose(size_bytes)
        for victim in victims:
            del self._entries[victim.model_id]
        self._entries[model_id] = Entry(model_id, size_bytes, used_s=now_s)
        return victims

    def excess(self) -> list[Entry]:
        """Take out the least recently used until the rest fits, as far as pins allow."""
        victims = []
        while self.used_bytes > self.capacity_bytes and (victim := self.evict_one()):
            victims.append(victim)
        return victims

    def evict_one(self) -> Entry | None:
        """Take out the least recently used model, if any may go."""
        victim = next(iter(self._evictable()), None)
        if victim is not None:
            del self._entries[victim.model_id]
        return victim

    def filled(self, model_id: str) -> None:
        self._entries[model_id].ready = True

    def forget(self, model_id: str) -> None:
        """Give a reservation back, or drop a model. No-op if it is not here."""
        self._entries.pop(model_id, None)

    def _evictable(self) -> list[Entry]:
        idle = [e for e in self._entries.values() if e.ready and not self._pins[e.model_id]]
        return sorted(idle, key=lambda e: (e.used_s, e.model_id))

    def _choose(self, need_bytes: int) -> list[Entry]:
        free = self.capacity_bytes - self.used_bytes
        victims = []
        for entry in self._evictable():
            if free >= need_bytes:
                break
            victims.append(entry)
            free += entry.size_bytes
        if free < need_bytes:
            raise TierFull(self.tier, need_bytes, max(free, 0))
        return victims


class Rate:
    """Bytes per second, as the median of the last 16 transfers: one slow disk moment does not move it."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=RATES_KEPT)

    def add(self, size_bytes: int, seconds: float) -> None:
        """Transfers of nothing or in no time say nothing."""
        if size_bytes > 0 and seconds > 0:
            self._rates.append(size_bytes / seconds)

    @property
    def bytes_per_s(self) -> float:
        """0 while unknown."""
        return statistics.median(self._rates) if self._rates else 0.0

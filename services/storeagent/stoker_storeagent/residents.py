"""Which models lie in the pool, and who holds on to them; pure. Sizes are in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import PoolExhausted

WINDOW_CHUNKS_MIN = 4
WINDOW_CHUNKS_MAX = 64
WINDOW_EVICTS_TO = 16
"""256 MiB keep a disk busy: for more than that a window only takes what is free."""
RESIDENTS_MAX = 256
"""Each has two descriptors open, however small the model is."""


@dataclass(eq=False)
class Resident:
    """One reading's chunks. whole: all of a model, for all who lease it; else a window for one lease alone."""

    model_id: str
    chunks: int
    whole: bool
    leases: int = 0
    complete: bool = False  # read to its end
    dropped: bool = False  # not to be leased any more: it failed, was evicted, or its files are gone
    used_s: float = 0.0  # when it was last asked for or given back


class Residents:
    """Chunks are taken until `free`, so what is added never exceeds chunks_total. A leased model is never evicted, nor one
    that is still being read."""

    def __init__(self, chunks_total: int) -> None:
        self.chunks_total = chunks_total
        self._all: set[Resident] = set()
        self._current: dict[str, Resident] = {}  # by model: the one that a lease may join

    @property
    def chunks_free(self) -> int:
        return self.chunks_total - sum(resident.chunks for resident in self._all)

    def __iter__(self) -> Iterator[Resident]:
        """Models that lie here as a whole, or will once they are read."""
        return iter(self._current.values())

    def find(self, model_id: str) -> Resident | None:
        return self._current.get(model_id)

    def fit(self, chunks: int) -> int:
        """How many chunks a model of `chunks` may have now: all, or a window. Raises PoolExhausted if neither can be had."""
        free = self.chunks_free
        most = free + sum(resident.chunks for resident in self._evictable())
        if chunks <= most:
            return chunks
        need = min(WINDOW_CHUNKS_MIN, self.chunks_total)
        if chunks <= need or most < need:
            raise PoolExhausted(chunks * CHUNK_BYTES, most * CHUNK_BYTES)
        return max(need, min(free, WINDOW_CHUNKS_MAX), min(most, WINDOW_EVICTS_TO))

    def evict(self, chunks: int) -> list[Resident]:
        """Drop the least recently used until `chunks` will be free: once the caller has freed what is returned."""
        victims: list[Resident] = []
        free = self.chunks_free
        for resident in self._evictable():
            if free >= chunks and len(self._all) - len(victims) < RESIDENTS_MAX:
                break
            self.drop(resident)
            victims.append(resident)
            free += resident.chunks
        return victims

    def add(self, model_id: str, chunks: int, now_s: float, *, whole: bool) -> Resident:
        """Take chunks that are free. The lease it is for is counted."""
        assert chunks <= self.chunks_free, f"{chunks} chunks are wanted and {self.chunks_free} are free"
        resident = Resident(model_id, chunks, whole, leases=1, used_s=now_s)
        self._all.add(resident)
        if whole:
            assert model_id not in self._current, f"{model_id} is here already"
            self._current[model_id] = resident
        return resident

    def lease(self, resident: Resident, now_s: float) -> None:
        assert not resident.dropped, f"{resident.model_id} was dropped"
        resident.leases += 1
        resident.used_s = now_s

    def release(self, resident: Resident, now_s: float) -> None:
        assert resident.leases > 0, f"{resident.model_id} is not leased"
        resident.leases -= 1
        resident.used_s = now_s

    def drop(self, resident: Resident) -> None:
        """Let nobody join it any more. It keeps its chunks until it is freed."""
        resident.dropped = True
        if self._current.get(resident.model_id) is resident:
            del self._current[resident.model_id]

    def unwanted(self, resident: Resident) -> bool:
        """Whether nobody has it and nobody can get it any more: its chunks should be freed."""
        return not resident.leases and (resident.dropped or not resident.whole)

    def free(self, resident: Resident) -> None:
        """Its chunks are the pool's again."""
        assert not resident.leases, f"{resident.model_id} is leased"
        self.drop(resident)
        self._all.remove(resident)

    def _evictable(self) -> list[Resident]:
        idle = [resident for resident in self._current.values() if resident.complete and not resident.leases]
        return sorted(idle, key=lambda resident: (resident.used_s, resident.model_id))

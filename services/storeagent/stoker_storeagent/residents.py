"""Which models lie in the pool, and who holds on to them; pure. Sizes are in chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import PoolExhausted
from stoker_policy.evict import Candidate, choose_victims

WINDOW_CHUNKS_MIN = 4
WINDOW_CHUNKS_MAX = 64
WINDOW_EVICTS_TO = 16
"""256 MiB keep a disk busy: for more than that a window only takes what is free."""
RESIDENTS_MAX = 256
"""Each has a descriptor open, however small the model is."""


@dataclass(eq=False)
class Resident:
    """One load's chunks. whole: all of a model, for all who lease it; else a window for one consumer alone.

    holders: who has it, by name, and how often.  busy: it is being filled, or copied to the SSD.
    yielding: nobody but a prefetch has asked for it yet, so that a start may take its room before it is complete.
    dropped: not to be leased any more: it failed, was evicted, or its model is gone.
    """

    model_id: str
    chunks: int
    whole: bool
    holders: Counter[str] = field(default_factory=Counter)
    busy: bool = True
    yielding: bool = False
    complete: bool = False
    dropped: bool = False
    used_s: float = 0.0  # when it was last asked for or given back

    @property
    def leases(self) -> int:
        return self.holders.total()


class Residents:
    """Chunks are taken until `free`, so what is added never exceeds chunks_total. Only what nobody holds and nothing is
    copied to or from is evicted; and for a start what only a prefetch wanted.

    refetch_s: what it would take to have a model's bytes in the pool again.
    """

    def __init__(self, chunks_total: int, refetch_s: Callable[[str, int], float]) -> None:
        self.chunks_total = chunks_total
        self._refetch_s = refetch_s
        self._all: set[Resident] = set()
        self._current: dict[str, Resident] = {}  # by model: the one that a lease may join

    @property
    def chunks_free(self) -> int:
        return self.chunks_total - sum(resident.chunks for resident in self._all)

    @property
    def all(self) -> frozenset[Resident]:
        """Whatever has chunks, dropped ones and windows included."""
        return frozenset(self._all)

    def __iter__(self) -> Iterator[Resident]:
        """Models that lie here as a whole, or will once they are read."""
        return iter(self._current.values())

    def find(self, model_id: str) -> Resident | None:
        return self._current.get(model_id)

    def fit(self, chunks: int, *, starting: bool = True) -> int:
        """How many chunks a model of `chunks` may have now: all, or for a start a window.

        Raises PoolExhausted if neither can be had.
        """
        free = self.chunks_free
        most = free + sum(resident.chunks for resident in self._evictable(starting))
        if chunks <= most:
            return chunks
        need = min(WINDOW_CHUNKS_MIN, self.chunks_total)
        if not starting or chunks <= need or most < need:
            raise PoolExhausted(chunks * CHUNK_BYTES, most * CHUNK_BYTES)
        return max(need, min(free, WINDOW_CHUNKS_MAX), min(most, WINDOW_EVICTS_TO))

    def evict(self, chunks: int, now_s: float, *, starting: bool = True) -> list[Resident]:
        """Drop what is least worth keeping until `chunks` will be free: once the caller has freed what is returned."""
        victims: list[Resident] = []
        if chunks > self.chunks_free:
            evictable = {resident.model_id: resident for resident in self._evictable(starting)}
            candidates = [
                Candidate(
                    key=resident.model_id,
                    size_bytes=resident.chunks * CHUNK_BYTES,
                    refetch_s=self._refetch_s(resident.model_id, resident.chunks * CHUNK_BYTES),
                    idle_s=max(now_s - resident.used_s, 0.0),
                )
                for resident in evictable.values()
            ]
            chosen = choose_victims(candidates, (chunks - self.chunks_free) * CHUNK_BYTES)
            assert chosen is not None, "`fit` said that there is room"
            victims = [evictable[key] for key in chosen]
        spare = [r for r in self._evictable(starting) if r not in victims]
        while spare and len(self._all) - len(victims) >= RESIDENTS_MAX:
            victims.append(spare.pop(0))
        for victim in victims:
            self.drop(victim)
        return victims

    def add(self, model_id: str, chunks: int, now_s: float, *, whole: bool, yielding: bool = False) -> Resident:
        """Take chunks that are free."""
        assert chunks <= self.chunks_free, f"{chunks} chunks are wanted and {self.chunks_free} are free"
        resident = Resident(model_id, chunks, whole, yielding=yielding, used_s=now_s)
        self._all.add(resident)
        if whole:
            assert model_id not in self._current, f"{model_id} is here already"
            self._current[model_id] = resident
        return resident

    def hold(self, resident: Resident, holder: str, now_s: float) -> None:
        assert not resident.dropped, f"{resident.model_id} was dropped"
        resident.holders[holder] += 1
        resident.yielding = False
        resident.used_s = now_s

    def share(self, resident: Resident, holder: str) -> None:
        """Hold it without having asked for it: for somebody who takes what is there."""
        resident.holders[holder] += 1

    def unshare(self, resident: Resident, holder: str) -> None:
        self.release(resident, holder, resident.used_s)

    def release(self, resident: Resident, holder: str, now_s: float) -> None:
        assert resident.holders[holder] > 0, f"{holder} does not hold {resident.model_id}"
        resident.holders[holder] -= 1
        if not resident.holders[holder]:
            del resident.holders[holder]
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

    def _evictable(self, starting: bool) -> list[Resident]:
        """Least recently used first."""
        found = [
            resident
            for resident in self._current.values()
            if not resident.leases and ((resident.complete and not resident.busy) or (starting and resident.yielding))
        ]
        return sorted(found, key=lambda resident: (resident.used_s, resident.model_id))

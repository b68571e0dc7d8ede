"""What the SSD tier holds: chunks, whose they are, and who holds on to them; pure.

A chunk may be several models'. It counts once, and goes with the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from stoker_contracts.models import Tier
from stoker_core.errors import TierFull
from stoker_policy.evict import Candidate, choose_victims


@dataclass
class Shelf:
    """One model's chunks.  reserved_bytes: room taken for those that are on their way.  used_s: when it was last asked for."""

    model_id: str
    total_bytes: int
    digests: dict[int, str] = field(default_factory=dict)  # by position
    reserved_bytes: int = 0
    used_s: float = 0.0


class Ledger:
    """Chunks and reservations never exceed capacity_bytes, but for what `adopt` finds: see `excess`.

    A pinned model is never chosen for eviction, nor one that chunks are on their way to.
    refetch_s: what it would take to have a model's bytes again.
    """

    def __init__(self, capacity_bytes: int, refetch_s: Callable[[str, int], float]) -> None:
        self.capacity_bytes = capacity_bytes
        self._refetch_s = refetch_s
        self._shelves: dict[str, Shelf] = {}
        self._size_of: dict[str, int] = {}
        self._owners: dict[str, Counter[str]] = {}
        self._pins: Counter[str] = Counter()
        self._claims: set[str] = set()
        self._chunk_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._chunk_bytes + sum(shelf.reserved_bytes for shelf in self._shelves.values())

    @property
    def chunks(self) -> Mapping[str, int]:
        """Digest → bytes."""
        return self._size_of

    def __iter__(self) -> Iterator[Shelf]:
        return iter(self._shelves.values())

    def shelf(self, model_id: str) -> Shelf | None:
        return self._shelves.get(model_id)

    def held_bytes(self, model_id: str) -> int:
        shelf = self._shelves.get(model_id)
        return sum(self._size_of[digest] for digest in shelf.digests.values()) if shelf else 0

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

    def claim(self, model_id: str) -> bool:
        """Whether the caller may bring chunks of this model from now on: one at a time does, until it settles."""
        if model_id in self._claims:
            return False
        self._claims.add(model_id)
        return True

    def used(self, model_id: str, now_s: float) -> None:
        if model_id in self._shelves:
            self._shelves[model_id].used_s = now_s

    def adopt(self, model_id: str, total_bytes: int, held: Mapping[int, tuple[str, int]], used_s: float) -> None:
        """What an earlier run left of a model: position → (digest, bytes)."""
        assert model_id not in self._shelves, f"{model_id} is here already"
        self._shelves[model_id] = Shelf(model_id, total_bytes, used_s=used_s)
        for position, (digest, size_bytes) in held.items():
            self._own(model_id, position, digest, size_bytes)

    def reserve(self, model_id: str, total_bytes: int, missing_bytes: int, now_s: float) -> list[str]:
        """Take room for the chunks that a model lacks. Returns the models to `evict` for it, now.

        Raises TierFull, changing nothing, if the room cannot be had.
        """
        victims = self._choose(missing_bytes, now_s, but=model_id)
        shelf = self._shelves.setdefault(model_id, Shelf(model_id, total_bytes))
        shelf.reserved_bytes += missing_bytes
        shelf.used_s = now_s
        return victims

    def excess(self, now_s: float) -> list[str]:
        """The models to `evict` so that the rest fits, as far as pins allow."""
        over = self.used_bytes - self.capacity_bytes
        if over <= 0:
            return []
        victims = self._victims(over, now_s)
        return victims if victims is not None else [shelf.model_id for shelf in self._evictable()]

    def worst(self, now_s: float) -> list[str]:
        """What is least worth keeping, if anything may go: for a disk that is fuller than the budget says."""
        return self._victims(1, now_s) or []

    def arrived(self, model_id: str, position: int, digest: str, size_bytes: int) -> None:
        """A reserved chunk is on the disk."""
        shelf = self._shelves[model_id]
        shelf.reserved_bytes = max(0, shelf.reserved_bytes - size_bytes)
        self._own(model_id, position, digest, size_bytes)

    def settle(self, model_id: str) -> None:
        """Who claimed it brings no more: give back what was reserved and not used."""
        self._claims.discard(model_id)
        shelf = self._shelves.get(model_id)
        if shelf is not None:
            shelf.reserved_bytes = 0
            if not shelf.digests:
                del self._shelves[model_id]

    def evict(self, model_id: str) -> list[str]:
        """Take a model out. Returns the chunks that are nobody's any more."""
        shelf = self._shelves.pop(model_id, None)
        return self._disown(model_id, shelf.digests.values()) if shelf is not None else []

    def lose(self, digest: str) -> list[str]:
        """A chunk is no good. Returns the models that lack it now."""
        owners = self._owners.pop(digest, None)
        if owners is None:
            return []
        self._chunk_bytes -= self._size_of.pop(digest)
        for model_id in owners:
            digests = self._shelves[model_id].digests
            for position in [at for at, of in digests.items() if of == digest]:
                del digests[position]
        return sorted(owners)

    def _own(self, model_id: str, position: int, digest: str, size_bytes: int) -> None:
        digests = self._shelves[model_id].digests
        if digests.get(position) == digest:
            return
        assert position not in digests, f"{model_id} has another chunk at {position}"
        digests[position] = digest
        if digest not in self._owners:
            self._owners[digest] = Counter()
            self._size_of[digest] = size_bytes
            self._chunk_bytes += size_bytes
        self._owners[digest][model_id] += 1

    def _disown(self, model_id: str, digests: Iterable[str]) -> list[str]:
        orphans = []
        for digest in digests:
            owners = self._owners[digest]
            owners[model_id] -= 1
            if not owners[model_id]:
                del owners[model_id]
            if not owners:
                del self._owners[digest]
                self._chunk_bytes -= self._size_of.pop(digest)
                orphans.append(digest)
        return orphans

    def _choose(self, need_bytes: int, now_s: float, *, but: str) -> list[str]:
        over = self.used_bytes + need_bytes - self.capacity_bytes
        if over <= 0:
            return []
        victims = self._victims(over, now_s, but=but)
        if victims is None:
            raise TierFull(Tier.SSD, need_bytes, max(self.capacity_bytes - self.used_bytes, 0))
        return victims

    def _victims(self, need_bytes: int, now_s: float, *, but: str = "") -> list[str] | None:
        """None: so much does not come free if all go that may."""
        alone = choose_victims(self._candidates(now_s, but), need_bytes)
        return list(alone) if alone is not None else self._together(need_bytes, but)

    def _evictable(self, but: str = "") -> list[Shelf]:
        """The least recently used first."""
        found = [s for s in self._shelves.values() if not (self._pins[s.model_id] or s.reserved_bytes)]
        return sorted((s for s in found if s.model_id != but), key=lambda shelf: (shelf.used_s, shelf.model_id))

    def _candidates(self, now_s: float, but: str) -> list[Candidate]:
        """By what would be free if that model alone went; chunks that two of them share are a bonus."""
        found = []
        for shelf in self._evictable(but):
            own = {digest for digest in shelf.digests.values() if len(self._owners[digest]) == 1}
            size_bytes = sum(self._size_of[digest] for digest in own)
            if size_bytes:
                found.append(
                    Candidate(
                        key=shelf.model_id,
                        size_bytes=size_bytes,
                        refetch_s=self._refetch_s(shelf.model_id, size_bytes),
                        idle_s=max(now_s - shelf.used_s, 0.0),
                    )
                )
        return found

    def _together(self, need_bytes: int, but: str) -> list[str] | None:
        """When no choice of single ones suffices: all that may go, but for those without whose chunks it is enough too."""
        going = self._evictable(but)
        ids = {shelf.model_id for shelf in going}
        staying = {digest: len(owners.keys() - ids) for digest, owners in self._owners.items()}  # models that have it
        free_bytes = sum(self._size_of[digest] for digest, models in staying.items() if not models)
        if free_bytes < need_bytes:
            return None
        for shelf in reversed(going):
            digests = set(shelf.digests.values())
            lost_bytes = sum(self._size_of[digest] for digest in digests if not staying[digest])
            if free_bytes - lost_bytes >= need_bytes:
                free_bytes -= lost_bytes
                ids.remove(shelf.model_id)
                for digest in digests:
                    staying[digest] += 1
        return [shelf.model_id for shelf in going if shelf.model_id in ids]

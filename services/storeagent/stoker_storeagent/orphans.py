"""Which instances may still read from a pool that this process took over; pure. Times are passed in, in seconds of a
monotonic clock.

Their leases ended with the agent that gave them, and what they have mapped of the pool nobody can take from them. So a chunk
that one of them may read is not to be written to until the worker says that it starts no more, or has died: its
instances die with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from stoker_storeagent.table import ResidentRecord

WORKER_GONE_S = 5.0
"""After so long without its worker an instance is dead: the kernel kills it with its parent, at once but not in no time."""


class Orphan(NamedTuple):
    """A hold on a resident. resident: index in the records."""

    resident: int
    instance_id: str


class Orphans:
    """Each hold is given out once when it ends, by whichever method learns of it; in the order of the records."""

    def __init__(self, records: Sequence[ResidentRecord], loading: Collection[str]) -> None:
        """records: as they were when the last agent ended.  loading: instances that the worker says are starting."""
        starting = set(loading)
        self._holds = [
            Orphan(index, instance_id)
            for index, record in enumerate(records)
            for instance_id in sorted(starting.intersection(record.holders))
        ]
        self._ends_s: float | None = None

    @property
    def holds(self) -> tuple[Orphan, ...]:
        return tuple(self._holds)

    def loaded(self, instance_id: str) -> list[Orphan]:
        """It is not starting any more."""
        return self._end({instance_id})

    def worker_lost(self, now_s: float) -> None:
        """Nobody listens where the worker did: it is dead. Saying so again changes nothing."""
        if self._ends_s is None:
            self._ends_s = now_s + WORKER_GONE_S

    def worker_seen(self) -> None:
        """Somebody listens there, and has not said which instances are starting: it may be the same worker."""
        self._ends_s = None

    def worker_back(self, loading: Collection[str]) -> list[Orphan]:
        """There is a worker: the same one, or another that knows nothing of those before it and has seen them end."""
        self._ends_s = None
        return self._end({hold.instance_id for hold in self._holds}.difference(loading))

    def expired(self, now_s: float) -> list[Orphan]:
        """All of them, once the worker has been lost for too long."""
        if self._ends_s is None or now_s < self._ends_s:
            return []
        return self._end({hold.instance_id for hold in self._holds})

    def _end(self, instance_ids: Collection[str]) -> list[Orphan]:
        ended = [hold for hold in self._holds if hold.instance_id in instance_ids]
        self._holds = [hold for hold in self._holds if hold.instance_id not in instance_ids]
        return ended

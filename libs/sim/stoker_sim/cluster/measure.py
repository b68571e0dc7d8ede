"""What came of a simulated workload."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from stoker_contracts.models import Tier
    from stoker_sim.cluster.requests import Request


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """startup: from a request's arrival until an instance works on it, and all later time in which none did, because it was
    preempted or moved; of one that timed out all that it waited. ttft: until its first token, of those that had one.

    Percentiles are of all requests, by nearest rank: at least so many of 100 were no slower.
    within_timeout, gpu_utilisation: shares of 1; the latter is of all devices, from the beginning until the last request's end.
    reads: starts by the tier that their weights came from.
    """

    requests: int
    startup_mean_s: float
    startup_p50_s: float
    startup_p95_s: float
    startup_p99_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    within_timeout: float
    starts: int
    migrations: int
    preemptions: int
    reads: dict[str, int]
    gpu_utilisation: float
    decisions: int
    simulated_s: float

    def row(self) -> dict[str, float | int]:
        """Flat, for tables and JSON."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "reads"}
        rounded = {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}
        return rounded | {f"reads_{tier}": count for tier, count in sorted(self.reads.items())}


class Meter:
    """Counts as it goes: 24 bytes a request."""

    def __init__(self) -> None:
        self.startup_s = array("d")
        self.ttft_s = array("d")
        self.timed_out = 0
        self.starts = self.migrations = self.preemptions = self.decisions = 0
        self.reads: Counter[str] = Counter()

    def started(self, tier: Tier) -> None:
        self.starts += 1
        self.reads[tier.value] += 1

    def ended(self, request: Request, *, in_time: bool) -> None:
        self.startup_s.append(request.waited_s)
        if request.first_token_s >= 0:
            self.ttft_s.append(request.first_token_s)
        if not in_time:
            self.timed_out += 1

    def result(self, *, busy_s: float, devices: int, until_s: float) -> Measured:
        """busy_s: of all devices together."""
        startup_s, ttft_s = sorted(self.startup_s), sorted(self.ttft_s)
        count = len(startup_s)
        return Measured(
            requests=count,
            startup_mean_s=mean(startup_s),
            startup_p50_s=percentile(startup_s, 50),
            startup_p95_s=percentile(startup_s, 95),
            startup_p99_s=percentile(startup_s, 99),
            ttft_mean_s=mean(ttft_s),
            ttft_p50_s=percentile(ttft_s, 50),
            ttft_p95_s=percentile(ttft_s, 95),
            ttft_p99_s=percentile(ttft_s, 99),
            within_timeout=(count - self.timed_out) / count if count else 1.0,
            starts=self.starts,
            migrations=self.migrations,
            preemptions=self.preemptions,
            reads=dict(self.reads),
            gpu_utilisation=busy_s / (devices * until_s) if until_s > 0 else 0.0,
            decisions=self.decisions,
            simulated_s=until_s,
        )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest rank of values in order; 0 of none."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0

"""What leaves a tier when room is needed: what is cheap to have again, large, and long unused."""

from __future__ import annotations

from collections.abc import Iterable

from stoker_policy.facts import View

AGEING_S = 60.0
"""Within about this long after their last use, candidates count as equally recent."""


class Candidate(View, frozen=True):
    """What may leave. refetch_s: what it would take to have it back.  idle_s: since it was used last."""

    key: str
    size_bytes: int
    refetch_s: float
    idle_s: float


def choose_victims(candidates: Iterable[Candidate], need_bytes: int) -> tuple[str, ...] | None:
    """Keys of those to give up so that need_bytes come free, least worth keeping first; None if all together do not cover it.

    None of the chosen could stay: without any one of them the rest would not cover the need. Being idle for longer never
    saves a candidate, and being dearer to refetch never condemns one.
    Source: GreedyDual-Size, cost by size with ageing: Cao, Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997.
    """
    chosen: list[Candidate] = []
    free_bytes = 0
    for candidate in sorted((c for c in candidates if c.size_bytes > 0), key=_order):
        if free_bytes >= need_bytes:
            break
        chosen.append(candidate)
        free_bytes += candidate.size_bytes
    if free_bytes < need_bytes:
        return None
    spared: set[str] = set()
    for candidate in reversed(chosen):  # a large last one may have made several small ones unnecessary
        if free_bytes - candidate.size_bytes >= need_bytes:
            free_bytes -= candidate.size_bytes
            spared.add(candidate.key)
    return tuple(c.key for c in chosen if c.key not in spared)


def _order(candidate: Candidate) -> tuple[float, str]:
    """Worth per byte, ties by key."""
    worth = candidate.refetch_s / candidate.size_bytes / (candidate.idle_s + AGEING_S)
    return worth, candidate.key

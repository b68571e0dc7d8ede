"""Who takes a model from whom when several nodes want it at once: chains, so that every link carries it once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median


def plan_fanout(
    holders: Collection[str], receivers: Collection[str], bandwidth_bytes_per_s: Mapping[tuple[str, str], float]
) -> dict[str, tuple[str, ...]]:
    """For each receiver the nodes to take the model from, best first: its predecessor in its chain, then the holders.

    A chain forwards chunk by chunk, so its length costs hardly any time, but it is as slow as its slowest member before the
    last: the fastest stand first. Every holder heads a chain; lengths differ by at most one. Without a holder all are one
    chain, whose first gets () and goes to the model's own source. A receiver that is a holder gets (), too.
    bandwidth_bytes_per_s: (reader, from whom) → measured; 0 or absent: unknown.
    Source: serial forwarding multicast of BlitzScale, "Fast and Live Large Model Autoscaling with O(1) Host Caching", OSDI 2025.
    """
    holding, waiting = set(holders), set(receivers) - set(holders)
    speed = _speeds(holding | waiting, bandwidth_bytes_per_s)
    fastest_first = sorted(speed, key=lambda node: (-speed[node], node))
    heads = [node for node in fastest_first if node in holding]
    takers = [node for node in fastest_first if node in waiting]
    plan: dict[str, tuple[str, ...]] = dict.fromkeys(receivers, ())
    chains = max(1, len(heads))
    for position, node in enumerate(takers):
        own_head = heads[position % chains : position % chains + 1]
        before = takers[position - chains : position - chains + 1] if position >= chains else own_head
        plan[node] = tuple(dict.fromkeys([*before, *own_head, *heads]))
    return plan


def _speeds(nodes: set[str], links: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """What each node can carry: both ends of a link can do at least what it did. Unknown ones count as the median."""
    seen: dict[str, float] = {}
    for (reader, source), bytes_per_s in links.items():
        for node in {reader, source} & nodes:
            seen[node] = max(seen.get(node, 0.0), bytes_per_s)
    known = [bytes_per_s for bytes_per_s in seen.values() if bytes_per_s > 0]
    usual = median(known) if known else 0.0
    return {node: seen.get(node, 0.0) or usual for node in nodes}

"""What it takes to have memory free on a device: who leaves, who stops, who moves, and how long that lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stoker_policy.commands import How
from stoker_policy.facts import InstanceView
from stoker_policy.sites import Slot

RESIDENTS_MAX = 12
"""Of one device that are weighed against one another; the quickest to leave."""
COVERS_MAX = 256
"""Partial choices kept at a time."""


class Leaver(NamedTuple):
    """One instance that could give its memory back. seconds: until it has.  idle_ms: 0 unless it is idle.

    to: where what it has in hand would go, if it moves: (instance or '', node, devices).
    certain: its memory may be promised, as it was told to end or will be.
    """

    seconds: float
    how: How
    instance: InstanceView
    size_bytes: int
    idle_ms: int = 0
    to: tuple[str, str, tuple[int, ...]] | None = None
    certain: bool = True

    @property
    def displaced(self) -> int:
        return 0 if self.how == "wait" else 1


class Clearing(NamedTuple):
    """How a device comes to have room; compared: the soonest, then the fewest displaced, then the longest idle, then the emptier."""

    seconds: float
    displaced: int
    busyness: int  # minus the milliseconds that those who are displaced have been idle
    crowd: int
    ids: tuple[str, ...]
    device: int
    leavers: tuple[Leaver, ...]


def clear(
    slot: Slot, missing_bytes: int, taken: int, leaver: Callable[[InstanceView, Slot], Leaver | None]
) -> Clearing | None:
    """How to have `missing_bytes` more on this device; None if that cannot be.

    taken: instances that will be there by earlier decisions.  leaver: what it takes to be rid of one; None: it stays.
    """
    crowd, device = len(slot.residents) + taken, slot.device.index
    if missing_bytes <= 0:
        return Clearing(0.0, 0, 0, crowd, (), device, ())
    found = [one for resident in slot.residents.values() if (one := leaver(resident, slot)) is not None]
    chosen = cover(found, missing_bytes)
    if chosen is None:
        return None
    return Clearing(
        max(one.seconds for one in chosen),
        sum(one.displaced for one in chosen),
        -sum(one.idle_ms for one in chosen),
        crowd,
        tuple(one.instance.instance_id for one in chosen),
        device,
        chosen,
    )


def cover(leavers: Sequence[Leaver], missing_bytes: int) -> tuple[Leaver, ...] | None:
    """Those who should go so that missing_bytes come free, the longest idle first; None if all together do not do.

    All go at the same time, so what counts is the slowest of them; of choices that are equally quick the one that displaces
    fewest, then the one whose requests take least to move, then the longest idle, then by id.
    Source: the migration plan of ServerlessLLM, OSDI 2024, 6.3, which is a dynamic program over what has to move; there for
    the sum of times on one server after the other, here for their maximum first: a threshold, and a knapsack below it.
    """
    quickest = sorted(leavers, key=lambda one: (one.seconds, -one.idle_ms, one.instance.instance_id))[:RESIDENTS_MAX]
    total_bytes, needed = 0, 0
    while total_bytes < missing_bytes:
        if needed == len(quickest):
            return None
        total_bytes += quickest[needed].size_bytes
        needed += 1
    slowest_s = quickest[needed - 1].seconds
    eligible = [one for one in quickest if one.seconds <= slowest_s]
    return _knapsack(sorted(eligible, key=lambda one: (-one.idle_ms, one.instance.instance_id)), missing_bytes)


_Cost = tuple[int, float, int, tuple[str, ...]]


def _knapsack(items: Sequence[Leaver], missing_bytes: int) -> tuple[Leaver, ...]:
    """The cheapest choice that covers, of items that cover together. Choices that cover no more and cost no less are dropped."""
    choices: dict[int, tuple[_Cost, tuple[Leaver, ...]]] = {0: ((0, 0.0, 0, ()), ())}
    for item in items:
        for covered, ((displaced, seconds, busyness, ids), chosen) in list(choices.items()):
            if covered >= missing_bytes:
                continue
            cost = (
                displaced + item.displaced,
                seconds + item.seconds,
                busyness - item.idle_ms,
                (*ids, item.instance.instance_id),
            )
            reached = min(missing_bytes, covered + item.size_bytes)
            if reached not in choices or cost < choices[reached][0]:
                choices[reached] = (cost, (*chosen, item))
        choices = _frontier(choices)
    if missing_bytes not in choices:  # only where COVERS_MAX cut the way to it
        return tuple(items)
    return choices[missing_bytes][1]


def _frontier(choices: dict[int, tuple[_Cost, tuple[Leaver, ...]]]) -> dict[int, tuple[_Cost, tuple[Leaver, ...]]]:
    kept: dict[int, tuple[_Cost, tuple[Leaver, ...]]] = {}
    cheapest: _Cost | None = None
    for covered in sorted(choices, reverse=True):
        cost = choices[covered][0]
        if cheapest is None or cost < cheapest:
            kept[covered] = choices[covered]
            cheapest = cost
        if len(kept) >= COVERS_MAX:
            break
    return kept

"""Nodes by how much memory their devices have left: so that a decision finds those with room without asking all."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import merge
from typing import NamedTuple

from stoker_contracts.models import DeviceKind

_RANKS = (1, 2, 4, 8, 16, 32, 64)


class Entry(NamedTuple):
    """One node on a shelf; in this order: fewer loads in hand, the faster way to the models' sources, the emptier device."""

    loads: int
    slowness: int
    crowd: int
    node: str


class Shelves:
    """For each device kind and number of devices (1, 2, 4 …) the nodes, shelved by the bytes that so many devices have left each.

    Shelf b holds 2**(b - 1) up to 2**b bytes, so that from shelf to shelf all fit or none, but for one that must be asked.
    """

    def __init__(self) -> None:
        self._shelves: dict[tuple[DeviceKind, int], dict[int, list[Entry]]] = {}
        self._placed: dict[str, list[tuple[DeviceKind, int, int, Entry]]] = {}

    def put(self, node: str, free: dict[DeviceKind, list[tuple[int, int]]], *, loads: int, slowness: int) -> None:
        """Shelve a node anew. free: per kind (bytes left, instances there) of each device."""
        entries = []
        for kind, devices in free.items():
            devices = sorted(devices, key=lambda d: (-d[0], d[1]))
            for ranks in _RANKS:
                if ranks > len(devices):
                    break
                left_bytes, crowd = devices[ranks - 1]
                entries.append((kind, ranks, max(0, left_bytes).bit_length(), Entry(loads, slowness, crowd, node)))
        before = self._placed.get(node, [])
        if entries == before:
            return
        self.drop(node)
        for kind, ranks, shelf, entry in entries:
            insort(self._shelves.setdefault((kind, ranks), {}).setdefault(shelf, []), entry)
        self._placed[node] = entries

    def drop(self, node: str) -> None:
        for kind, ranks, shelf, entry in self._placed.pop(node, []):
            entries = self._shelves[(kind, ranks)][shelf]
            del entries[bisect_left(entries, entry)]

    def fitting(self, kind: DeviceKind, ranks: int, need_bytes: int) -> Iterator[str]:
        """Nodes that may have so much left on each of so many devices, the best first; those that cannot are left out."""
        shelves = self._shelves.get((kind, _known(ranks)), {})
        lowest = need_bytes.bit_length()
        return (entry.node for entry in merge(*(entries for shelf, entries in shelves.items() if shelf >= lowest)))

    def roomiest(self, kind: DeviceKind, ranks: int, need_bytes: int) -> Iterator[str]:
        """Nodes that have less than that left on so many devices, those with the most first."""
        shelves = self._shelves.get((kind, _known(ranks)), {})
        lowest = need_bytes.bit_length()
        for shelf in sorted((s for s in shelves if s <= lowest), reverse=True):
            yield from (entry.node for entry in shelves[shelf])


def _known(ranks: int) -> int:
    """The largest number of devices that nodes are shelved by and that is not above `ranks`."""
    return max(r for r in _RANKS if r <= max(1, ranks))

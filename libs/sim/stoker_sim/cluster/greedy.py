"""What the policies that Stoker's is compared with have in common: an instance for each request, the oldest first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from stoker_sim.cluster.orders import Begin, Deaf, End, Move, Order

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.nodes import Node, Seat
    from stoker_sim.cluster.world import World


class Greedy(Deaf):
    """Every request that waits, and that no instance on its way is going to take, gets one of its own (or one for as many as an
    instance serves), by age. Idle instances stay for their keep-alive, but give way to anyone who needs their device.
    """

    def decide(self, world: World) -> Iterator[Order]:
        yield from expired(world)
        hopeless: set[tuple[int, int]] = set()
        for line in uncovered(world):
            if line.need in hopeless:
                continue
            order = self.place(world, line)
            if order is None:
                hopeless.add(line.need)  # nor is there room for others of its size
            else:
                yield order

    @abstractmethod
    def place(self, world: World, line: Line) -> Begin | Move | None:
        """Where an instance starts; None: nowhere now."""


class Cleared(NamedTuple):
    """Devices of one node, and the idle instances that go from them."""

    devices: tuple[int, ...]
    evicts: tuple[Instance, ...]


def expired(world: World) -> Iterator[End]:
    """Instances past their keep-alive."""
    over = []
    for instance in world.idle.values():  # all models have the same keep-alive, so the first that stays ends it
        if world.now_s - instance.idle_since_s <= instance.line.spec.keep_alive_s:
            break
        over.append(instance)
    return (End(instance=instance) for instance in over)


def uncovered(world: World) -> Iterator[Line]:
    """For each instance that is missing its line, in the order in which the first request for it came."""

    def one(line: Line) -> Iterator[tuple[float, int, Line]]:
        slots, live = line.spec.slots, len(line.instances) + line.coming
        missing = islice(line.waiting, line.starting_slots(), None, slots)
        for request in islice(missing, max(0, line.spec.max_replicas - live)):
            yield request.arrived_s, request.number, line

    # A preempted request stands first, and is older: lines are in order of arrival, or nearly.
    return (line for _, _, line in merge(*(list(one(line)) for line in world.waiting.values())))


def clear(node: Node, line: Line, *, without: Collection[int] = ()) -> Cleared | None:
    """Devices that have room, or would without what is idle on them: free ones first, then those idle for longest."""
    options = []
    for seat in node.seats:
        if seat.device.index not in without:
            evicts = evictable(seat, line)
            if evicts is not None:
                since_s = max((i.idle_since_s for i in evicts), default=-1.0)
                options.append((since_s, seat.device.index, evicts))
    ranks = max(1, line.spec.tensor_parallel)
    if len(options) < ranks:
        return None
    chosen = sorted(options, key=lambda option: option[:2])[:ranks]
    going = {i.instance_id: i for _, _, found in chosen for i in found}
    return Cleared(tuple(sorted(index for _, index, _ in chosen)), tuple(going.values()))


def evictable(seat: Seat, line: Line) -> tuple[Instance, ...] | None:
    """Idle instances to be rid of so that there is room, the longest idle first; None: that does not do."""
    missing_bytes = line.spec.bytes_on(seat.device) - seat.free_bytes
    if missing_bytes <= 0:
        return ()
    evicts = []
    for instance in sorted(
        (i for i in seat.residents.values() if i.idle), key=lambda i: (i.idle_since_s, i.instance_id)
    ):
        evicts.append(instance)
        missing_bytes -= instance.line.spec.bytes_on(seat.device)
        if missing_bytes <= 0:
            return tuple(evicts)
    return None

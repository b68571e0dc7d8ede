"""What earlier decisions of the same moment gave away: the facts do not show it yet, and the next decision must."""

from __future__ import annotations

from collections import Counter

from stoker_contracts.models import ModelSpec
from stoker_policy.commands import Start
from stoker_policy.room import Leaver
from stoker_policy.sites import LANES, Site


class Reserved:
    """Devices, loads and departures that were decided and not put into the cluster yet.

    leaving: ids of instances that are going to end.  given: node → bytes that it will give to peers.
    moved: instance → requests that will come to it from others.
    """

    def __init__(self) -> None:
        self.taken_bytes: Counter[tuple[str, int]] = Counter()
        self.taken: Counter[tuple[str, int]] = Counter()
        self.load_bytes: Counter[tuple[str, str]] = Counter()
        self.given: Counter[str] = Counter()
        self.leaving: dict[str, float] = {}
        self.moved: Counter[str] = Counter()

    def take(self, site: Site, model: ModelSpec, devices: tuple[int, ...]) -> None:
        """An instance will be there: now, or once there is room for it."""
        for index in devices:
            self.taken_bytes[(site.name, index)] += model.bytes_on(site.slots[index].device)
            self.taken[(site.name, index)] += 1

    def start(self, start: Start) -> None:
        """What it loads: others on the same way come after it."""
        load = start.load
        if load.source in LANES:
            self.load_bytes[(start.node, LANES[load.source])] += load.size_bytes
        for peer in start.sources[:1]:
            self.given[peer] += load.size_bytes

    def leave(self, leaver: Leaver) -> None:
        """What it holds comes free."""
        self.leaving[leaver.instance.instance_id] = leaver.seconds

    def adopt(self, trial: Reserved) -> None:
        """What was tried on a copy holds."""
        if trial is not self:
            self.__dict__.update(trial.__dict__)

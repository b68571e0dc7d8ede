"""Instances as decisions look them up: by model, by who gives to them, by how long they idle."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from stoker_contracts.models import Tier
from stoker_policy.facts import InstanceView


class Instances:
    """All instances that are known. Facts carry ages as of when they were put.

    leaving: ids of live ones that were told to end.
    """

    def __init__(self) -> None:
        self.views: dict[str, InstanceView] = {}
        self.leaving: set[str] = set()
        self._put_ms: dict[str, int] = {}
        self._of_model: dict[str, dict[str, InstanceView]] = {}
        self._given_by: dict[str, dict[str, InstanceView]] = {}  # node → those that start and load from it
        self._idle: list[tuple[int, str]] = []  # (since when, instance)

    def put(self, view: InstanceView, now_ms: int) -> None:
        """Known under this id before, it is replaced."""
        instance_id = view.instance_id
        if instance_id in self.views:
            self.drop(instance_id)
        self.views[instance_id] = view
        self._put_ms[instance_id] = now_ms
        self._of_model.setdefault(view.model_id, {})[instance_id] = view
        if view.idle:
            insort(self._idle, self._idle_key(view))
        if view.live and view.leaving:
            self.leaving.add(instance_id)
        giver = _giver(view)
        if giver:
            self._given_by.setdefault(giver, {})[instance_id] = view

    def drop(self, instance_id: str) -> None:
        view = self.views.pop(instance_id)
        if view.idle:
            del self._idle[bisect_left(self._idle, self._idle_key(view))]
        del self._put_ms[instance_id]
        _take_out(self._of_model, view.model_id, instance_id)
        self.leaving.discard(instance_id)
        giver = _giver(view)
        if giver:
            _take_out(self._given_by, giver, instance_id)

    def put_ms(self, instance_id: str) -> int:
        return self._put_ms[instance_id]

    def of_model(self, model_id: str) -> Iterable[InstanceView]:
        return self._of_model.get(model_id, {}).values()

    def given_by(self, node: str) -> Iterable[InstanceView]:
        return self._given_by.get(node, {}).values()

    def longest_idle(self) -> Iterator[InstanceView]:
        """The longest idle first, ties by id."""
        return (self.views[instance_id] for _, instance_id in self._idle)

    def _idle_key(self, view: InstanceView) -> tuple[int, str]:
        return (self._put_ms[view.instance_id] - view.idle_ms, view.instance_id)


def _giver(view: InstanceView) -> str:
    """The peer that one that starts loads from; '': none."""
    return view.load.origin if view.live and view.load is not None and view.load.source is Tier.PEER else ""


def _take_out(groups: dict[str, dict[str, InstanceView]], group: str, instance_id: str) -> None:
    """Groups without members are not kept."""
    del groups[group][instance_id]
    if not groups[group]:
        del groups[group]

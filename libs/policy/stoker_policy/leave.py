"""How long it takes until an instance gives its memory back, and whether it may be asked to at all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import log

from stoker_contracts.models import InstanceState
from stoker_policy.cluster import Cluster
from stoker_policy.facts import InstanceView
from stoker_policy.reserve import Reserved
from stoker_policy.room import Leaver
from stoker_policy.sites import Slot

STOP_S = 1.0
"""From the order to stop an idle instance until its memory is free."""
TOKEN_S = 0.05
"""Between two tokens of a request, where it is not known."""
MOVED_TOKENS = 1024
"""Of a request that is moved, where its length is not known."""

Destination = tuple[float, str, str, tuple[int, ...]]
"""Seconds until it can take over, the instance that does ('': a new one), its node and devices."""


class Leaving:
    """What one decision may count on of those who hold memory.

    spared: models whose instances stay, since somebody waits for them.  waited_ms: how long it has been waited for room already.
    """

    def __init__(
        self,
        cluster: Cluster,
        reserved: Reserved,
        spared: Collection[str],
        waited_ms: int,
        destination: Callable[[InstanceView], Destination | None],
    ) -> None:
        self._cluster, self._reserved, self._spared = cluster, reserved, spared
        self._waited_s, self._destination = waited_ms / 1000, destination
        self._known: dict[str, tuple[Leaver, ...]] = {}

    def leaver(self, instance: InstanceView, slot: Slot) -> Leaver | None:
        """The quickest way to be rid of it; None: it stays."""
        found = self._known.get(instance.instance_id)
        if found is None:
            one = self._leaver(instance, slot)
            found = self._known[instance.instance_id] = () if one is None else (one,)
        return found[0]._replace(size_bytes=slot.held_bytes(instance)) if found else None

    def _leaver(self, instance: InstanceView, slot: Slot) -> Leaver | None:
        size_bytes = slot.held_bytes(instance)
        if instance.instance_id in self._reserved.leaving:
            return Leaver(self._reserved.leaving[instance.instance_id], "wait", instance, size_bytes)
        if instance.leaving:
            return Leaver(self._gone_s(instance), "wait", instance, size_bytes)
        if instance.state is not InstanceState.READY or instance.model_id in self._spared or self._needed(instance):
            return None
        if instance.idle:
            return Leaver(STOP_S, "stop", instance, size_bytes, self._cluster.idle_ms(instance))
        # Who waits for those with work in hand may wait in vain, as new work may come. So what was waited for so far counts
        # as what is still to be waited for at least: nobody waits longer than anything else would have taken, twice
        # the best at most (the ski rental problem: Karlin et al., "Competitive snoopy caching", 1988).
        waiting = Leaver(max(self._finished_s(instance), self._waited_s) + STOP_S, "wait", instance, size_bytes)
        waiting = waiting._replace(certain=False)
        to = self._destination(instance) if self._cluster.migrates else None
        if to is None:
            return waiting
        tokens = instance.running_tokens or instance.running * MOVED_TOKENS
        moved_s = to[0] + self._cluster.estimates.migration(to[2], tokens).value + STOP_S
        if waiting.seconds <= moved_s:
            return waiting
        return Leaver(moved_s, "migrate", instance, size_bytes, to=to[1:])

    def _gone_s(self, instance: InstanceView) -> float:
        """Of one that was told to end. The longer it takes already, the less it can be said when it will."""
        age_s = (self._cluster.stop_asked_ms(instance) or 0) / 1000
        left_s = STOP_S - age_s if age_s < STOP_S else age_s - STOP_S
        return left_s + (self._finished_s(instance) if instance.running else 0.0)

    def _finished_s(self, instance: InstanceView) -> float:
        """Until all that it has in hand is done: of several with exponential rests the last takes about 1 + ln n times the mean."""
        tokens = self._cluster.estimates.remaining_tokens(instance.model_id, instance.generated_tokens).value
        return tokens * (instance.token_s or TOKEN_S) * (1 + log(max(1, instance.running)))

    def _needed(self, instance: InstanceView) -> bool:
        """Whether its model would have fewer than it must have."""
        model = self._cluster.models.get(instance.model_id)
        if model is None or model.min_replicas <= 0:
            return False
        return len(self._cluster.serving(instance.model_id)) <= model.min_replicas

"""One decision: stop what is no longer wanted, start what is, make room where there is none."""

from __future__ import annotations

from stoker_contracts.models import ModelSpec
from stoker_policy.backoff import backoff_ms
from stoker_policy.cluster import Cluster
from stoker_policy.commands import Command, Decision, Prepare, Stop
from stoker_policy.facts import View
from stoker_policy.leave import STOP_S
from stoker_policy.place import place
from stoker_policy.prepare import prepare
from stoker_policy.reserve import Reserved
from stoker_policy.scale import surplus


class Decided(View, frozen=True):
    """stops: of what is no longer wanted.  placements: in the order of demand, of which later ones know the earlier."""

    stops: tuple[Stop, ...]
    placements: tuple[Decision, ...]
    prepares: tuple[Prepare, ...]

    @property
    def commands(self) -> list[Command]:
        """All of them, in the order in which they are meant."""
        placed = [command for decision in self.placements for command in decision.commands]
        return [*self.stops, *placed, *self.prepares]


def decide(cluster: Cluster) -> Decided:
    """What to do in this state of the cluster; equal facts, in whatever order they came, give equal decisions.

    Placements come in order of demand: the oldest wait first, ties by model id; then those that only their load or their
    options want.
    """
    cluster.scaling.refresh(cluster.models, cluster.now_ms)
    stops = surplus(cluster)
    reserved = Reserved()
    for one in stops:
        reserved.leaving[one.instance_id] = STOP_S
    placements = []
    turn = wanting(cluster)
    while turn:  # one instance each before anybody gets a second
        further = []
        for model, missing in turn:
            # Who waits may displace others, but for those who wait too and instances of its own model; who does not wait, nobody.
            spared = {*cluster.demands, model.model_id} if model.model_id in cluster.demands else cluster.models
            decision = place(cluster, model, reserved, spared)
            placements.append(decision)
            if decision.commands and missing > 1:  # without any, another one of it would find no more room
                further.append((model, missing - 1))
        turn = further
    return Decided(stops=tuple(stops), placements=tuple(placements), prepares=tuple(prepare(cluster)))


def wanting(cluster: Cluster) -> list[tuple[ModelSpec, int]]:
    """Models with fewer instances than they should have and how many they lack, but for those in back-off."""
    counts = {model_id: replicas.count for model_id, replicas in cluster.scaling.counts().items()}
    for model_id in cluster.demands:
        counts[model_id] = max(1, counts.get(model_id, 0))
    wants = []
    for model_id, count in counts.items():
        model = cluster.models.get(model_id)
        missing = count - len(cluster.serving(model_id)) if model is not None else 0
        if model is not None and missing > 0 and not _backs_off(cluster, model_id):
            demanded = model_id in cluster.demands
            wants.append(((not demanded, -cluster.wait_ms(model_id), model_id), model, missing))
    return [(model, missing) for _, model, missing in sorted(wants, key=lambda want: want[0])]


def _backs_off(cluster: Cluster, model_id: str) -> bool:
    failure = cluster.failures.get(model_id)
    return failure is not None and cluster.failed_ms(failure) < backoff_ms(failure.in_row)

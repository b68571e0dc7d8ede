"""Which architectures nodes should pay the first start of before anybody waits for it."""

from __future__ import annotations

from stoker_policy.cluster import Cluster
from stoker_policy.commands import Prepare


def prepare(cluster: Cluster) -> list[Prepare]:
    """One command per node and unprepared vLLM architecture, by (node, architecture).

    A node whose zygote still imports is left alone: both want the same cores, and nothing starts without the zygote.
    """
    known = cluster.architectures
    commands: list[Prepare] = []
    for name in sorted(known.unprepared):
        view = cluster.sites[name].view
        if view is None or not view.usable or not view.zygote_ready:
            continue
        commands += [
            Prepare(node=name, model_id=known.first_model(architecture), architecture=architecture)
            for architecture in known.all()
            if architecture not in view.prepared and architecture not in view.preparing
        ]
    return commands

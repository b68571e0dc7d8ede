"""Which architectures nodes should pay the first start of before anybody waits for it."""

from __future__ import annotations

from stoker_contracts.models import EngineKind
from stoker_policy.cluster import Cluster
from stoker_policy.commands import Prepare


def prepare(cluster: Cluster) -> list[Prepare]:
    """One command per node and unprepared vLLM architecture, by (node, architecture).

    A node whose zygote still imports is left alone: both want the same cores, and nothing starts without the zygote.
    """
    models = {
        m.architecture: m.model_id
        for m in sorted(cluster.models, key=lambda m: m.model_id, reverse=True)
        if m.engine is EngineKind.VLLM
    }
    return [
        Prepare(node=node.name, model_id=models[architecture], architecture=architecture)
        for node in sorted(cluster.nodes, key=lambda n: n.name)
        if node.usable and node.zygote_ready
        for architecture in sorted(models)
        if architecture not in node.prepared and architecture not in node.preparing
    ]

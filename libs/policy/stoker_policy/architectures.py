"""Which vLLM architectures there are, and which nodes have not paid the first start of one."""

from __future__ import annotations

from stoker_contracts.models import EngineKind, ModelSpec
from stoker_policy.facts import NodeView


class Architectures:
    """unprepared: nodes that lack one, being prepared or not."""

    def __init__(self) -> None:
        self.unprepared: set[str] = set()
        self._models: dict[str, set[str]] = {}  # architecture → models
        self._nodes: dict[str, NodeView] = {}

    def put_model(self, model: ModelSpec) -> None:
        if model.engine is not EngineKind.VLLM:
            return
        models = self._models.setdefault(model.architecture, set())
        models.add(model.model_id)
        if len(models) == 1:
            for view in self._nodes.values():
                self.put_node(view)

    def drop_model(self, model: ModelSpec) -> None:
        models = self._models.get(model.architecture, set())
        models.discard(model.model_id)
        if not models:
            self._models.pop(model.architecture, None)

    def put_node(self, view: NodeView) -> None:
        self._nodes[view.name] = view
        if any(a not in view.prepared for a in self._models):
            self.unprepared.add(view.name)
        else:
            self.unprepared.discard(view.name)

    def drop_node(self, name: str) -> None:
        self._nodes.pop(name, None)
        self.unprepared.discard(name)

    def all(self) -> list[str]:
        """In order."""
        return sorted(self._models)

    def first_model(self, architecture: str) -> str:
        """The first of its models, by id."""
        return min(self._models[architecture])

"""How many instances each model with a choice should have: asked once a second at most, and only of models that are used."""

from __future__ import annotations

from stoker_contracts.models import ModelSpec
from stoker_policy.due import Due
from stoker_policy.loads import Loads
from stoker_policy.replicas import Limits, Replicas, wanted

INTERVAL_MS = 1000


def scales(model: ModelSpec) -> bool:
    """Whether there is anything to decide: otherwise it is one instance where it is demanded, and none where it is not."""
    return model.min_replicas > 0 or model.max_replicas > 1


class Scaling:
    """What `replicas.wanted` last said of each model that scales."""

    def __init__(self) -> None:
        self._loads = Loads()
        self._due = Due()
        self._ready: dict[str, int] = {}
        self._replicas: dict[str, Replicas] = {}

    def note(self, model: ModelSpec, now_ms: int, *, running: int, queued: int, ready: int) -> None:
        """Take what is in hand of a model now."""
        model_id = model.model_id
        if not (running or queued or ready or model.min_replicas > 0 or model_id in self._ready):
            return  # not in use
        self._loads.note(model_id, now_ms, running=running, queued=queued, ready=ready)
        known = self._ready.get(model_id)
        self._ready[model_id] = ready
        if known is None or queued > 0 or ready != known:
            self._due.put(model_id, now_ms)

    def forget(self, model_id: str) -> None:
        self._loads.forget(model_id)
        self._due.drop(model_id)
        self._ready.pop(model_id, None)
        self._replicas.pop(model_id, None)

    def refresh(self, models: dict[str, ModelSpec], now_ms: int) -> None:
        """Ask again for those whose turn it is."""
        for model_id in self._due.over(now_ms):
            model = models[model_id]
            limits = Limits(
                min_replicas=max(0, min(model.min_replicas, model.max_replicas)),
                max_replicas=max(1, model.max_replicas),
                target_concurrency=model.target_concurrency,
            )
            samples = self._loads.samples(model_id, now_ms)
            ready = self._ready[model_id]
            found = wanted(limits, samples, ready=ready, slots=model.slots)
            if found.count == 0 and ready == 0:
                self.forget(model_id)  # it comes back with its next request
                continue
            self._replicas[model_id] = found
            self._due.put(model_id, now_ms + INTERVAL_MS)

    def counts(self) -> dict[str, Replicas]:
        """Of all models that scale; () of instances where none is wanted."""
        return self._replicas

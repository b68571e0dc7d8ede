"""Until when an instance is left alone: the moment from which on a decision must ask whether it should end."""

from __future__ import annotations

from stoker_contracts.models import InstanceState, ModelSpec
from stoker_policy.backoff import backoff_ms
from stoker_policy.facts import InstanceView
from stoker_policy.idle import LINGER_S, IdleTimes, Window


def window(model: ModelSpec, idle_times: IdleTimes) -> Window:
    """How long an idle instance of it stays: as its model says, or as its idle times do where the model leaves it to them."""
    if model.keep_alive_auto:
        return idle_times.window(model.model_id, model.keep_alive_s)
    return Window(prewarm_s=0.0, keep_alive_s=model.keep_alive_s, basis="option")


def quiet_ms(instance: InstanceView, model: ModelSpec | None, idle_times: IdleTimes) -> int | None:
    """For how long after its facts were put nothing but other facts can end it; None: nothing can. model: None if deleted."""
    if not instance.live:
        return None
    if instance.stop_asked_ms is not None:
        return max(0, backoff_ms(instance.stops) - instance.stop_asked_ms)
    if instance.state is InstanceState.STOPPING or instance.running > 0:
        return None
    if model is None:
        return 0
    if not instance.idle:
        return None
    kept = window(model, idle_times)
    stays_s = min(LINGER_S, kept.keep_alive_s) if kept.prewarm_s > 0 else kept.keep_alive_s
    return max(0, int(stays_s * 1000) - instance.idle_ms)

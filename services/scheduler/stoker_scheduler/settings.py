"""Settings of the scheduler: `STOKER_SCHEDULER_…`, beside the shared ones."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from stoker_contracts.control import SILENCE_LIMIT_S
from stoker_core.settings import SharedSettings

Positive = Annotated[float, Meta(gt=0)]


class SchedulerSettings(SharedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    SCOPE: ClassVar[str] = "scheduler"

    decide_interval_s: Positive = 0.25  # at the latest; demand and status wake it at once
    standby_interval_s: Positive = 0.5  # between tries to lead
    check_interval_s: Positive = 0.5  # between pings of the lock's connection; below its 2 s idle timeout
    models_interval_s: Positive = 1.0
    reconcile_interval_s: Positive = 1.0
    announce_interval_s: Positive = 0.5
    start_budget_s: Positive = 120.0  # from the decision until an instance is ready
    command_timeout_s: Positive = 5.0  # for a worker's answer; asked twice
    commands_at_once: Annotated[int, Meta(ge=1, le=256)] = 16
    silence_limit_s: Positive = SILENCE_LIMIT_S
    majority_silence_limit_s: Positive = 15.0  # where most nodes fall silent at once while another one speaks
    link_limit_s: Positive = 10.0  # a leader cut off from the bus for this long lets another lead
    prepare_again_s: Positive = 60.0
    history_s: Positive = 7 * 24 * 3600.0  # how long instances that ended are remembered

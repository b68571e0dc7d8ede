"""What Postgres should say of instances, written only when it changes."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from stoker_contracts.models import InstanceState, StartPhases
from stoker_core.logging import get_logger
from stoker_db.ports import Instances
from stoker_scheduler.records import Tracked
from stoker_scheduler.state import State

log = get_logger("reconcile")


Became = Callable[[Tracked, InstanceState], None]
"""Told an instance whose new state was recorded, and the state that was recorded before."""


async def reconcile(state: State, instances: Instances, became: Became) -> bool:
    """Adopt what was found on nodes, record actual states, forget what ended. Returns whether anything was adopted.

    Raises StaleTerm, DatabaseUnavailable; what was written before stays written and is not repeated.
    """
    adopted = False
    for instance_id in sorted(state.instances):
        tracked = state.instances.get(instance_id)
        if tracked is None:
            continue
        if not tracked.written and tracked.status is not None:
            await _adopt(tracked, instances)
            adopted = True
        await _record(tracked, instances, state.term, became)
        if tracked.ended:
            state.forget(instance_id)
    return adopted


async def _adopt(tracked: Tracked, instances: Instances) -> None:
    row = tracked.row
    await instances.desire(row)
    # A row of this id may exist with another actual state, which desire leaves as it is.
    tracked.row, tracked.written = replace(row, actual=InstanceState.UNKNOWN), True
    log.info("instance_adopted", instance=row.instance_id, model_id=row.model_id, node=row.node, state=row.actual)


async def _record(tracked: Tracked, instances: Instances, term: int, became: Became) -> None:
    row, status, actual = tracked.row, tracked.status, tracked.state
    phases = status.phases if status and status.phases != StartPhases() else row.phases
    if actual is row.actual and phases == row.phases:
        return
    reason = tracked.gone or (status.failure if status else "")
    if actual is InstanceState.STOPPED and row.desired is InstanceState.READY:
        # Its worker stopped it by itself. As long as it were desired it would count as live.
        stopped = replace(row, desired=InstanceState.STOPPED, term=term, reason=reason or "stopped by its worker")
        await instances.desire(stopped)
    await instances.record(row.instance_id, actual, reason=reason, phases=phases)
    # Not `row`: a stop may have been desired while this was written.
    tracked.row = replace(tracked.row, actual=actual, phases=phases)
    if actual is not row.actual:
        became(tracked, row.actual)
    log.info(
        "instance_recorded",
        instance=row.instance_id,
        model_id=row.model_id,
        node=row.node,
        state=actual,
        reason=reason,
        start_ms=phases.start_ms,
    )

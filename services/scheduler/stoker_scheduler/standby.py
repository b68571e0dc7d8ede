"""Wait for the lead."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from stoker_core.errors import DatabaseUnavailable
from stoker_core.logging import get_logger
from stoker_db.ports import Leadership

log = get_logger("standby")


async def stand_by(leadership: Leadership, leader_id: str, stop: asyncio.Event, *, interval_s: float) -> int | None:
    """Try to lead every `interval_s`: the term, or None if `stop` was set first. Waits out a database that is away."""
    standing = failing = False
    while not stop.is_set():
        try:
            term = await leadership.acquire(leader_id)
            failing = False
        except DatabaseUnavailable as error:
            term = None
            if not failing:
                log.warning("database_awaited", error=error.message)
            failing = True
        if term is not None:
            log.info("lead_taken", term=term, leader=leader_id)
            return term
        if not standing and not failing:
            log.info("standing_by", leader=leader_id)
            standing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await stop.wait()
    return None

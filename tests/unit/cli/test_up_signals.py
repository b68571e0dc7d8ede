"""Stopping a local system whose terminal, or whoever read its output, is gone."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from stoker_cli import up as module
from stoker_core.clock import SystemClock


class FakeSupervisor:
    def __init__(self) -> None:
        self.running, self.killed = asyncio.Event(), False

    async def run(self, stop: asyncio.Event, kill: asyncio.Event) -> None:
        self.running.set()
        await stop.wait()
        self.killed = kill.is_set()


class FakeWelcome:
    async def run(self) -> None:
        await asyncio.Event().wait()


def broken(line: str) -> None:
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_the_system_also_if_nobody_can_be_told(number: int) -> None:
    """Ctrl-C at `stoker up | tee log` ends tee first; a closed terminal takes the output with it."""
    supervisor = FakeSupervisor()
    heard = module.if_anybody_reads(broken)
    running = asyncio.create_task(
        module._run(supervisor, FakeWelcome(), SystemClock(), heard)  # type: ignore[arg-type]
    )
    await supervisor.running.wait()
    os.kill(os.getpid(), number)
    async with asyncio.timeout(10):
        await running
    assert not supervisor.killed

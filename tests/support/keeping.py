"""The two ends of what a worker keeps for its storage agent, without the processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from stoker_core.unix import listen
from stoker_worker.keeper import PoolKeeper


@dataclass
class Worker:
    """starting: instances that are."""

    path: Path
    keeper: PoolKeeper
    starting: list[str] = field(default_factory=list)

    def ended(self, instance_id: str) -> None:
        self.starting.remove(instance_id)
        self.keeper.changed()


@contextlib.asynccontextmanager
async def worker(path: Path, *starting: str) -> AsyncIterator[Worker]:
    names = list(starting)
    keeper = PoolKeeper(listen(path, setting="S", who="worker"), lambda: names)
    running = asyncio.create_task(keeper.part().run())  # type: ignore[arg-type]
    try:
        yield Worker(path, keeper, names)
    finally:
        running.cancel()
        await asyncio.wait([running])
        keeper.close()


def memory(name: str) -> int:
    """A memfd that holds its name."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.pwrite(fd, name.encode(), 0)
    return fd


def contents(fd: int) -> str:
    return os.pread(fd, 100, 0).decode()

"""A loop whose time jumps, for logic that waits: nothing in it sleeps for real."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any


class _Jumping(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits, and no timer will wake one")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when every task waits for it, and then at once."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own. Nothing may be left running when it ends."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def watched() -> None:
            await test(*args, **kwargs)
            assert others() == set()

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(watched())

    return run


class LoopClock:
    """The running loop's time."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.monotonic_s(), UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def others() -> set[asyncio.Task[Any]]:
    """Tasks that are not over, besides this one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def steps(count: int) -> None:
    """Let others go on, so far that no timer is needed."""
    for _ in range(count):
        await asyncio.sleep(0)

"""An event loop in virtual time: nothing waits, and the same program runs the same way every time.

Ready callbacks run in the order in which they became ready, timers by (when, sequence); time jumps to the next timer once
nothing is ready. Where interleavings shall differ, delays drawn from a seed make them do so. There are no threads, sockets
or signals: whoever asks for one gets an error.

Tasks may belong to a process, which is killed as `kill -9` does it: none of them runs another instruction, no `finally` of
theirs is executed, and their timers are gone. Whatever they shared with others stays as it was.
Source: BaseEventLoop of CPython 3.11 and 3.12, of which `_run_once`, `_ready` and `_scheduled` are used.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import heapq
import itertools
import struct
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from datetime import UTC, datetime
from typing import Any, TypeVar, TypeVarTuple, cast

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")

_STEP = struct.Struct("<dq")
_PRUNE_AT = 64
_CLOSES_MAX = 1000
"""How often a killed task's `finally` may await something at its burial before it is given up."""


class Deadlock(RuntimeError):
    """Every task is blocked and no timer will ever wake one."""


class Killed(BaseException):
    """This process was killed: what unwinds because of it never happened. Raised at crash points, see `crash_point`."""


class Process:
    """What is killed at once. doom: the crash point at which it will be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.doom = ""
        self.tasks: list[asyncio.Task[Any]] = []
        self._mourners: list[Callable[[], None]] = []

    def on_death(self, told: Callable[[], None]) -> Callable[[], None]:
        """Call `told` when it is killed. Returns what takes that back."""
        self._mourners.append(told)

        def forget() -> None:
            if told in self._mourners:
                self._mourners.remove(told)

        return forget

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            mourners, self._mourners = self._mourners, []
            for told in mourners:
                Context().run(told)


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)
"""Whose code runs; None: the world's."""


def crash_point(name: str = "") -> None:
    """A place at which a process may be killed in the midst of its code. Nothing goes on from here in a dead one."""
    process = PROCESS.get()
    if process is None:
        return
    if process.alive and name and process.doom == name:
        process.kill()
    if not process.alive:
        raise Killed(process.name)


class SimTask(asyncio.Task[Any]):
    """Hashed by the order of creation, so that sets of tasks are walked in the same order every time."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(coro, **kwargs)
        cast(Any, self)._log_destroy_pending = False

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimLoop(asyncio.BaseEventLoop):
    """watch: called after each step. complaints: what asyncio would have logged, such as failures nobody looked at."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._sequence, self._numbers = itertools.count(), itertools.count()
        self._trace = hashlib.sha256()
        self._ready: deque[asyncio.Handle]
        self._scheduled: list[tuple[float, int, asyncio.TimerHandle]]
        self._stopping: bool
        self._processes: list[Process] = []
        self.steps = 0
        self.watch: Callable[[], None] | None = None
        self.complaints: list[dict[str, Any]] = []
        self.set_task_factory(cast(Any, self._make_task))
        self.set_exception_handler(lambda _, context: self.complaints.append(context))

    @property
    def trace(self) -> str:
        """A digest of every step so far, and of what `mark` was given."""
        return self._trace.hexdigest()

    def mark(self, what: str) -> None:
        self._trace.update(what.encode())

    def time(self) -> float:
        return self._now_s

    # Processes.

    def spawn(self, process: Process | None, work: Coroutine[Any, Any, T], *, name: str = "") -> asyncio.Task[T]:
        """Run `work` as a task of `process`, whoever asks for it."""
        context = Context()
        context.run(PROCESS.set, process)
        return cast("asyncio.Task[T]", self.create_task(work, name=name or None, context=context))

    def later(self, delay_s: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """As call_later, on nobody's behalf: it happens whoever is killed."""
        return self.call_later(delay_s, callback, context=Context())

    def tasks_of(self, process: Process) -> list[asyncio.Task[Any]]:
        return [task for task in process.tasks if not task.done()]

    # Running.

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Until `work` is done. Raises Deadlock if that can never be."""
        return self.run_until_complete(self.spawn(None, work))

    def run_for(self, seconds: float) -> None:
        """Let so much time pass."""
        self.later(seconds, self.stop)
        self.run_forever()

    def close(self) -> None:
        """Also of the tasks of dead processes: only now, when nobody can see it, are their frames unwound."""
        if self.is_closed():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for process in self._processes:
                for task in process.tasks:
                    _bury(process, task)
            self._ready.clear()
            super().close()

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, (when, next(self._sequence), handle))
        return handle

    def run_in_executor(self, executor: object, func: Callable[[*_Ts], T], *args: *_Ts) -> asyncio.Future[T]:
        raise RuntimeError("threads are outside of the simulation")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when its time comes."""

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nothing waits that would have to be woken."""

    def _run_once(self) -> None:
        while self._scheduled and _is_void(self._scheduled[0][2]):
            heapq.heappop(self._scheduled)
        if not self._ready:
            if self._scheduled:
                self._now_s = max(self._now_s, self._scheduled[0][0])
            elif not self._stopping:
                raise Deadlock(f"at {self._now_s:.6f} s nothing is ready and no timer is set")
            else:
                return
        while self._scheduled and self._scheduled[0][0] <= self._now_s:
            self._ready.append(heapq.heappop(self._scheduled)[2])
        handle = self._ready.popleft()
        if _is_void(handle):
            return
        self.steps += 1
        self._trace.update(_STEP.pack(self._now_s, len(self._ready)))
        handle._run()
        if self.watch is not None:
            self.watch()

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], context: Context | None = None
    ) -> SimTask:
        task = SimTask(coro, number=next(self._numbers), loop=loop, context=context)
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            if process not in self._processes:
                self._processes.append(process)
            # Held until they are done: what is dropped of a dead process must not be collected, for that runs `finally`.
            process.tasks.append(task)
            if len(process.tasks) >= _PRUNE_AT and len(process.tasks) & (len(process.tasks) - 1) == 0:
                process.tasks[:] = [task for task in process.tasks if not task.done()]
        return task


class SimClock:
    """Implements stoker_core.clock.Clock."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def monotonic_s(self) -> float:
        return self._loop.time()

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self._loop.time(), UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@contextmanager
def sim_loop() -> Iterator[SimLoop]:
    loop = SimLoop()
    try:
        yield loop
    finally:
        loop.close()


def _is_void(handle: asyncio.Handle) -> bool:
    if handle.cancelled():
        return True
    context: Context = cast(Any, handle)._context
    process = context.get(PROCESS)
    return process is not None and not process.alive


def _bury(process: Process, task: asyncio.Task[Any]) -> None:
    """Close a frame that will never run again. What it does about that is not part of the simulation."""
    if task.done():
        return
    context = contextvars.copy_context()
    process.alive = False
    context.run(PROCESS.set, process)
    chain: list[Any] = [task.get_coro()]
    while hasattr(inner := getattr(chain[-1], "cr_await", None), "close"):
        chain.append(inner)
    for frame in reversed(chain):  # from within: an outer one that ends leaves inner ones that do not to the collector
        for _ in range(_CLOSES_MAX):
            with suppress(BaseException):  # it awaits something, or misses what is dead as well
                context.run(frame.close)
                break

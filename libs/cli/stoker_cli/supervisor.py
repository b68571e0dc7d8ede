"""Keep a set of processes running: start in dependency order, restart what dies, stop in reverse order.

One event loop, no threads: a child must be forked from the thread that lives as long as the process,
because the kernel ties the parent-death signal to that thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker_cli.process import Child, spawn, tail
from stoker_core.clock import Clock
from stoker_core.errors import SetupFailed

LOG_BYTES_MAX = 20 * 1024 * 1024
LOG_CHECK_S = 5.0
PROBE_INTERVAL_S = 0.1
FIRST_START_TRIES = 3
EXIT_BAD_SETTINGS = 2


async def always_ready() -> bool:
    return True


async def nothing() -> None:
    return None


@dataclass(frozen=True)
class ProcessSpec:
    """One supervised process.

    env: its whole environment.  after: names that must be ready before it starts.
    ready: polled until True.  once_ready: run the first time it is ready, before others may start on it.
    own_log: where it writes its log if not to its output; quoted when it dies.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    after: tuple[str, ...] = ()
    ready: Callable[[], Awaitable[bool]] = always_ready
    once_ready: Callable[[], Awaitable[None]] = nothing
    ready_timeout_s: float = 60.0
    stop_signal: int = signal.SIGTERM
    stop_timeout_s: float = 15.0
    death_signal: int = signal.SIGKILL
    popen: Mapping[str, Any] = field(default_factory=dict)
    own_log: Path | None = None


@dataclass
class Backoff:
    """Delays before restarts: doubling up to a cap, and from the start again after a long enough life."""

    first_s: float = 0.2
    cap_s: float = 10.0
    reset_after_s: float = 30.0
    deaths: int = 0  # in a row

    def after(self, lived_s: float) -> float:
        """The delay before the next start of a process that lived for `lived_s`."""
        self.deaths = 1 if lived_s >= self.reset_after_s else self.deaths + 1
        return min(self.cap_s, self.first_s * 2.0 ** min(self.deaths - 1, 30))


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have a number only
        return f"killed by signal {-code}"


class Supervisor:
    """Runs `specs`, each dependency before what needs it. Logs go to `<logs>/<name>.log`."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        logs: Path,
        clock: Clock,
        report: Callable[[str], None],
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._specs = {spec.name: spec for spec in start_order(specs)}
        self._logs = logs
        self._clock = clock
        self._report = report
        self._backoff = backoff
        self._ready = {name: asyncio.Event() for name in self._specs}
        self._children: dict[str, Child] = {}
        self._established = False

    def pid(self, name: str) -> int | None:
        """The process id of a child that runs now."""
        child = self._children.get(name)
        return child.pid if child and child.running else None

    async def wait_ready(self, *names: str) -> None:
        """Return once all of `names` (default: every process) are ready."""
        for name in names or tuple(self._specs):
            await self._ready[name].wait()

    def establish(self) -> None:
        """The system works: from now on, whatever dies is started again for ever. Before, it may end the run."""
        self._established = True

    async def run(self, stop: asyncio.Event, kill: asyncio.Event) -> None:
        """Run until `stop` is set, then stop all in reverse order; `kill` cuts that short.

        Raises SetupFailed (in an ExceptionGroup) if, before `establish`, a process refuses its settings or keeps dying.
        No child is left either way.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        for name in self._specs:
            rotate(self._log(name))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._keep(spec), name=spec.name) for spec in self._specs.values()]
                tasks.append(group.create_task(self._cap_logs(), name="logs"))
                await stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            await self._stop_all(kill)

    async def _keep(self, spec: ProcessSpec) -> None:
        """Start, watch and restart one process, for ever."""
        backoff, was_ready = self._backoff(), False
        while True:
            if spec.after:
                await self.wait_ready(*spec.after)
            began_s = self._clock.monotonic_s()
            try:
                child = self._children[spec.name] = self._spawn(spec)
            except SetupFailed as error:
                if not self._established:
                    raise
                delay_s = backoff.after(0.0)
                self._report(f"{error.message}; trying again in {delay_s:g} s")
                await self._clock.sleep(delay_s)
                continue
            if await self._became_ready(spec, child):
                if was_ready:
                    self._report(f"{spec.name} is back")
                else:
                    await spec.once_ready()
                was_ready = True
                self._ready[spec.name].set()
            code = await child.wait()
            self._ready[spec.name].clear()
            delay_s = backoff.after(self._clock.monotonic_s() - began_s)
            last = tail(self._log(spec.name)) or (tail(spec.own_log) if spec.own_log else [])
            if not self._established and (code == EXIT_BAD_SETTINGS or backoff.deaths >= FIRST_START_TRIES):
                raise SetupFailed(f"{spec.name} does not start ({describe_exit(code)}):\n" + indent(last))
            self._report(f"{spec.name} {describe_exit(code)}; starting it again in {delay_s:g} s")
            if backoff.deaths >= FIRST_START_TRIES:
                self._report(indent(last))
            await self._clock.sleep(delay_s)

    def _spawn(self, spec: ProcessSpec) -> Child:
        try:
            with self._log(spec.name).open("ab") as output:
                return spawn(spec.command, env=spec.env, output=output, death_signal=spec.death_signal, **spec.popen)
        except OSError as error:
            raise SetupFailed(f"{spec.name} cannot be executed: {error}") from error

    async def _became_ready(self, spec: ProcessSpec, child: Child) -> bool:
        """Poll until ready; False if it ended before, or was ended because it took too long."""
        until_s = self._clock.monotonic_s() + spec.ready_timeout_s
        while child.running:
            if await spec.ready():
                return True
            if self._clock.monotonic_s() > until_s:
                self._report(f"{spec.name} was not ready within {spec.ready_timeout_s:g} s")
                await child.stop(spec.stop_signal, spec.stop_timeout_s)
                return False
            await self._clock.sleep(PROBE_INTERVAL_S)
        return False

    async def _cap_logs(self) -> None:
        while True:
            await self._clock.sleep(LOG_CHECK_S)
            for name in self._specs:
                try:
                    cap(self._log(name), LOG_BYTES_MAX)
                except OSError as error:
                    self._report(f"the log of {name} was cut without keeping what it held: {error}")

    async def _stop_all(self, kill: asyncio.Event) -> None:
        killer = asyncio.ensure_future(self._kill_on(kill))
        try:
            for name in reversed(self._specs):
                child, spec = self._children.get(name), self._specs[name]
                if child and child.running and not await child.stop(spec.stop_signal, spec.stop_timeout_s):
                    self._report(f"{name} did not stop within {spec.stop_timeout_s:g} s and was killed")
        finally:
            killer.cancel()
            for child in self._children.values():
                child.kill()
            with contextlib.suppress(asyncio.CancelledError):
                await killer

    async def _kill_on(self, kill: asyncio.Event) -> None:
        await kill.wait()
        for child in self._children.values():
            child.kill()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def start_order(specs: Sequence[ProcessSpec]) -> list[ProcessSpec]:
    """`specs`, each after everything it depends on, else as given. Raises ValueError if that cannot be."""
    order: list[ProcessSpec] = []
    waiting = list(specs)
    while waiting:
        started = {spec.name for spec in order}
        free = next((spec for spec in waiting if started.issuperset(spec.after)), None)
        if free is None:
            raise ValueError(f"dependencies cannot be met: {', '.join(spec.name for spec in waiting)}")
        order.append(free)
        waiting.remove(free)
    return order


def rotate(log: Path) -> None:
    """Move a log aside, replacing the one before; the process that writes it must not be running."""
    if log.exists() and log.stat().st_size:
        log.replace(log.with_suffix(".log.1"))


def cap(log: Path, limit_bytes: int) -> None:
    """Move what a log holds aside once it is over the limit, while its writer goes on.

    Writers append, so emptying the file under them is safe; a line written in between is lost.
    Raises OSError if there is no room to keep what it held; it is emptied even so.
    """
    if log.exists() and log.stat().st_size > limit_bytes:
        try:
            shutil.copyfile(log, log.with_suffix(".log.1"))
        finally:
            with log.open("r+b") as file:
                file.truncate()


def indent(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) or "    (its log is empty)"

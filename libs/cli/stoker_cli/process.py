"""A child process that cannot outlive its parent, awaited without threads."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with(parent: int, death_signal: int) -> Callable[[], None]:
    def before_exec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        # The parent may have died between fork and prctl; then no signal would ever come.
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


class Child:
    """A running child in a session of its own. Create it with `spawn`, inside an event loop."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """The exit status; minus the signal's number if a signal ended it."""
        return await asyncio.shield(self._ended)

    def send(self, number: int) -> None:
        """Signal the child itself; nothing happens if it has ended."""
        if self.running:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    async def stop(self, number: int, timeout_s: float) -> bool:
        """Signal, wait, and kill after `timeout_s`. False if it had to be killed."""
        self.send(number)
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait()
                return True
        except TimeoutError:
            self.kill()
            await self.wait()
            return False

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # What it left in its group goes with it. Before reaping: until then nobody else can get its process id.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        os.close(self._pidfd)
        self._ended.set_result(code)


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    output: IO[bytes],
    death_signal: int = signal.SIGKILL,
    **popen: Any,
) -> Child:
    """Start `command` in its own session; the kernel sends it `death_signal` when this process dies, however it dies.

    output: where its standard output and error go.  popen: further arguments of subprocess.Popen (user, group, cwd).
    Raises OSError if it cannot be executed.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with(os.getpid(), death_signal),
        **popen,
    )
    return Child(process)


def tail(path: Path, lines: int = 5, *, read_bytes: int = 8192) -> list[str]:
    """The last non-empty lines of a log; none if there is no such file."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - read_bytes))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]

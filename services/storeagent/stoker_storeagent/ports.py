"""What the storage agent needs of others, and the port that its tiers stand behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stoker_contracts.models import ModelSpec, Tier
from stoker_db.ports import ModelFile

OnProgress = Callable[[int, int], Awaitable[None]]
"""(done_bytes, total_bytes), at most ten times a second."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files, complete and unchanging for as long as the lease lasts.

    source: where they were when they were asked for.  wait_ms: from the request until they were here.
    """

    model_id: str
    path: Path
    source: Tier
    total_bytes: int
    wait_ms: float


class Store(Protocol):
    """Brings models to this node and keeps them while they are leased."""

    def lease(self, model_id: str, on_progress: OnProgress) -> AbstractAsyncContextManager[Held]:
        """Enter: fetch the model if need be. Nothing evicts it until exit.

        Raises ModelNotFound, RefusedCheckpoint, TierFull, StorageFailed, DatabaseUnavailable, Overloaded, Stopping.
        """
        ...

    def observe_load(self, source: Tier, read_bytes: int, load_ms: float) -> None:
        """An instance has read a leased model."""
        ...


class Catalogue(Protocol):
    """Which models exist, and what their files must be."""

    async def find(self, model_id: str) -> tuple[ModelSpec, Sequence[ModelFile]]:
        """Raises ModelNotFound, DatabaseUnavailable."""
        ...

    async def bind(self, model_id: str, digests: dict[str, str]) -> None:
        """Fix the digests of files on their first arrival. Raises CorruptCheckpoint if others are fixed, DatabaseUnavailable."""
        ...


class Events(Protocol):
    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None: ...

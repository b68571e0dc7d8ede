"""What the storage agent needs of others, and the port that its tiers stand behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stoker_contracts.control import HeldModel, TierStatus
from stoker_contracts.models import ModelSpec, Tier
from stoker_db.ports import ModelFile

OnProgress = Callable[[int, int], Awaitable[None]]
"""(done_bytes, total_bytes), at most ten times a second."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files, complete and unchanging for as long as the lease lasts.

    source: where the model was when it was asked for.  wait_ms: from the request until it could be read.
    descriptors: of the pool and of the board, if its weights are leased in memory, and with `ring` of a ring on the
    device that was asked for and of its board; valid while the lease lasts.
    """

    model_id: str
    path: Path
    source: Tier
    total_bytes: int
    wait_ms: float
    descriptors: tuple[int, ...] = ()
    ring: bool = False


class Store(Protocol):
    """Brings models to this node and keeps them while they are leased."""

    def lease(
        self, model_id: str, on_progress: OnProgress, *, weights: bool, device: str
    ) -> AbstractAsyncContextManager[Held]:
        """Enter: fetch the model if need be, and begin to read its weights into memory if they are wanted.

        Nothing evicts it until exit. A reading that fails after that is the board's to tell.
        device: UUID of the GPU that the weights are for, where a ring is made if one can be had; empty: none is.
        Raises ModelNotFound, RefusedCheckpoint, TierFull, PoolExhausted, StorageFailed, DatabaseUnavailable, Overloaded,
        Stopping.
        """
        ...

    def observe_load(self, held: Held, read_bytes: int, load_ms: float) -> None:
        """An instance has read a leased model."""
        ...


class Tiers(Protocol):
    """What a node's tiers hold, for those who report it and keep it in order."""

    def held(self) -> list[HeldModel]:
        """Complete models per tier, the fastest tier first, the most recently used first."""
        ...

    def status(self) -> tuple[TierStatus, ...]: ...

    async def drop(self, model_id: str, reason: str) -> bool:
        """Remove a model unless it is leased or being filled. Returns whether it was removed."""
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

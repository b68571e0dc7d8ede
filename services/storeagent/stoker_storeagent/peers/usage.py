"""How many peers are being served, as others who look for a source want to know it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stoker_core.clock import Clock

LINGER_S = 1.0
"""A peer that takes chunk after chunk is served between two of them, too."""


@dataclass
class _Use:
    in_hand: int = 0
    ended_s: float = 0.0


class Usage:
    """Counts by model and node, whatever the number of a node's connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, str], _Use] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def serving(self) -> int:
        """Nodes that take a model now, or did within the last second; one that takes two models counts twice."""
        self._forget()
        return len(self._uses)

    @contextmanager
    def taking(self, model_id: str, node: str) -> Iterator[None]:
        use = self._uses.setdefault((model_id, node), _Use())
        use.in_hand += 1
        self._idle.clear()
        try:
            yield
        finally:
            use.in_hand -= 1
            use.ended_s = self._clock.monotonic_s()
            self._forget()
            if not any(use.in_hand for use in self._uses.values()):
                self._idle.set()

    async def idle(self) -> None:
        """Until nothing is in hand."""
        await self._idle.wait()

    def _forget(self) -> None:
        since_s = self._clock.monotonic_s() - LINGER_S
        for key in [key for key, use in self._uses.items() if not use.in_hand and use.ended_s <= since_s]:
            del self._uses[key]

"""What was in hand of each model over the last minute or so, at bounded cost."""

from __future__ import annotations

from collections import deque

from stoker_policy.facts import View

SPACING_MS = 1000
"""Samples lie at least this far apart, but for the newest, which is always the latest that was noted."""
HORIZON_MS = 66_000
"""Older ones than needed for a panic window at the far end of a stable window are dropped."""
MODELS_MAX = 16_384


class Load(View, frozen=True):
    """What was in hand `age_ms` ago, and from then until the next newer sample.

    running, queued: requests on instances and before them, everywhere.  ready: instances that took requests then.
    """

    age_ms: int
    running: int
    queued: int
    ready: int

    @property
    def concurrency(self) -> int:
        return self.running + self.queued


class Loads:
    """Samples per model. At most MODELS_MAX models: the one noted longest ago gives way.

    Time is what the caller counts, in milliseconds; it must not run backwards, and only differences are used.
    """

    def __init__(self) -> None:
        self._noted: dict[str, deque[tuple[int, int, int, int]]] = {}

    def note(self, model_id: str, now_ms: int, *, running: int, queued: int, ready: int) -> None:
        samples = self._noted.pop(model_id, None) or deque()
        if len(samples) >= 2 and samples[-1][0] - samples[-2][0] < SPACING_MS:
            samples.pop()
        samples.append((now_ms, running, queued, ready))
        # The newest of those beyond the horizon stays: it says what held at the horizon.
        while len(samples) >= 2 and now_ms - samples[1][0] >= HORIZON_MS:
            samples.popleft()
        self._noted[model_id] = samples
        if len(self._noted) > MODELS_MAX:
            del self._noted[next(iter(self._noted))]

    def samples(self, model_id: str, now_ms: int) -> tuple[Load, ...]:
        """Newest first; () if nothing was noted."""
        return tuple(
            Load(age_ms=max(0, now_ms - at_ms), running=running, queued=queued, ready=ready)
            for at_ms, running, queued, ready in reversed(self._noted.get(model_id, ()))
        )

    def forget(self, model_id: str) -> None:
        self._noted.pop(model_id, None)

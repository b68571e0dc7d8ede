"""Who is to be looked at by when: so that a decision looks at those alone, and not at all there are."""

from __future__ import annotations

from heapq import heappop, heappush

_STALE_MAX = 64  # entries out of date, beyond as many as there are keys


class Due:
    """Keys with the time from which on each is to be looked at. Those whose time has come stay until they are put anew or dropped."""

    def __init__(self) -> None:
        self._at_ms: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        self._over: set[str] = set()

    def put(self, key: str, at_ms: int) -> None:
        if self._at_ms.get(key) == at_ms:
            return
        self._over.discard(key)
        self._at_ms[key] = at_ms
        heappush(self._heap, (at_ms, key))
        if len(self._heap) > 2 * len(self._at_ms) + _STALE_MAX:
            self._heap = sorted((at, of) for of, at in self._at_ms.items() if of not in self._over)

    def drop(self, key: str) -> None:
        self._over.discard(key)
        self._at_ms.pop(key, None)

    def over(self, now_ms: int) -> list[str]:
        """Keys whose time has come, in order."""
        while self._heap and self._heap[0][0] <= now_ms:
            at_ms, key = heappop(self._heap)
            if self._at_ms.get(key) == at_ms:
                self._over.add(key)
        return sorted(self._over)

"""Stop strings: text is cut where the first to be complete begins, wherever tokens end."""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Passes text on up to where a stop string begins, holding back only what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: non-empty strings; none at all passes everything."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now. Once `stopped`, nothing more comes."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        # The one that is complete first cuts, so that it does not matter in which pieces the text came.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

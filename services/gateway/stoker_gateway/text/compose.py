"""The text that a client sees, out of the tokens that an instance made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stoker_contracts.inference import Finish
from stoker_gateway.text.detokenise import Decode, Detokeniser
from stoker_gateway.text.stops import StopCutter


class Composer:
    """finish_reason: 'stop' or 'length' once the answer is complete.  completion_tokens: those it took, the last one included."""

    def __init__(self, decode: Decode, *, stops: Sequence[str], end_ids: Iterable[int]) -> None:
        """end_ids: tokens that end an answer; as its last token such a one is not part of the text."""
        self._detokeniser = Detokeniser(decode)
        self._cutter = StopCutter(stops)
        self._step = 1 if stops else 0  # with stop strings the count must end at the token that completes one
        self._end_ids = frozenset(end_ids)
        self._end: list[int] = []  # an end token, held until it is known whether the answer ends with it
        self.finish_reason: str | None = None
        self.completion_tokens = 0

    def push(self, tokens: Sequence[int], finish: Finish | None) -> str:
        """The text that these tokens add; `finish` comes with the last of them."""
        fresh = [*self._end, *tokens]
        self._end = fresh[-1:] if fresh and fresh[-1] in self._end_ids else []
        shown = fresh[: len(fresh) - len(self._end)]
        pieces = []
        step = self._step or max(len(shown), 1)
        for at in range(0, len(shown), step):
            piece = shown[at : at + step]
            self.completion_tokens += len(piece)
            pieces.append(self._cutter.push(self._detokeniser.push(piece)))
            if self._cutter.stopped:
                break
        if finish is not None and not self._cutter.stopped:
            pieces += self._finish(finish)
        if self._cutter.stopped:
            self.finish_reason = "stop"
        return "".join(pieces)

    def _finish(self, finish: Finish) -> list[str]:
        pieces = []
        self.completion_tokens += len(self._end)
        if finish is not Finish.STOP:  # it was the last that fitted, not the end
            pieces.append(self._cutter.push(self._detokeniser.push(self._end)))
        pieces.append(self._cutter.push(self._detokeniser.flush()))
        if not self._cutter.stopped:
            pieces.append(self._cutter.flush())
            self.finish_reason = "stop" if finish is Finish.STOP else "length"
        return pieces

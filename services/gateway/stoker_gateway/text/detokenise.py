"""Tokens to text, piece by piece, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids → text, special tokens left out, what is no UTF-8 replaced by U+FFFD."""

_BROKEN = "\ufffd"
_BROKEN_MAX = 3  # an unfinished UTF-8 character decodes to at most three replacement characters
_WINDOW_MAX = 64  # tokens decoded again while a character stays unfinished
_TAIL = 12  # tokens that are sure to hold every byte of what is held back


class Detokeniser:
    """What `push` returned so far and `flush` returns add up to the decoding of all tokens at once.

    Decodes a window that begins where a character began, so that decoders which look at neighbours (byte
    fallback, stripped leading spaces) see the same as in a full decode, and holds back an unfinished character.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were returned
        self._fresh = 0  # index in the window of the first token since the last whole character

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; may be empty."""
        if not tokens:
            return ""
        self._window.extend(tokens)
        text = self._decode(self._window)
        whole = len(text) - _broken_at_end(text)
        ready = text[self._sent : whole]
        self._sent = max(self._sent, whole)
        if ready and whole == len(text):
            self._restart(self._fresh, len(self._decode(self._window[self._fresh :])))
        elif len(self._window) > _WINDOW_MAX + len(tokens):
            held = len(text) - whole
            self._restart(len(self._window) - _TAIL, len(self._decode(self._window[-_TAIL:])) - held)
        return ready

    def flush(self) -> str:
        """What was held back; bytes that never became a character come out as U+FFFD."""
        rest = self._decode(self._window)[self._sent :]
        self._sent += len(rest)
        return rest

    def _restart(self, start: int, sent: int) -> None:
        del self._window[:start]
        self._sent = sent
        self._fresh = len(self._window)


def _broken_at_end(text: str) -> int:
    return min(len(text) - len(text.rstrip(_BROKEN)), _BROKEN_MAX)

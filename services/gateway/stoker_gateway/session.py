"""The token journal of one request: what an instance's frames mean for it. No I/O."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import Enum

from stoker_contracts.codec import pack_tokens, unpack_tokens
from stoker_contracts.inference import Finish, Frame, Wanted
from stoker_core.errors import ClientTooSlow, EngineFailed, StokerError


class Verdict(Enum):
    """What became of a frame."""

    ACCEPTED = "accepted"
    REPEAT = "repeat"  # nothing new in it
    GAP = "gap"  # earlier tokens are missing; the next ack asks for them again
    STRANGER = "stranger"  # not from the attempt and instance on record: to be answered with Cancel


class Session:
    """Accepts every token once and in order, from the (attempt, instance) on record only.

    The journal holds the tokens of all attempts, so that another instance can go on where one stopped.
    Ends once: by a finish, or by a failure.
    """

    def __init__(self, request_id: str, *, tokens_max: int, buffer_max: int) -> None:
        """tokens_max: of the whole answer.  buffer_max: tokens that may wait for a reader."""
        self.request_id = request_id
        self.attempt = 0
        self.node = ""
        self.instance_id = ""
        self.journal: array[int] = array("I")
        self.finish: Finish | None = None
        self.failure: StokerError | None = None
        self._tokens_max = tokens_max
        self._buffer_max = buffer_max
        self._taken = 0

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.failure is not None

    @property
    def wanted(self) -> Wanted:
        """The ack: the first index not yet received; a finish counts as one token more."""
        return Wanted(
            request_id=self.request_id,
            attempt=self.attempt,
            next=len(self.journal) + (self.finish is not None),
        )

    @property
    def generated(self) -> bytes:
        """The journal, packed, for the next attempt."""
        return pack_tokens(self.journal)

    def begin(self, node: str, instance_id: str) -> int:
        """Record a new attempt, at this instance; frames of earlier ones count no more. Returns its number."""
        assert not self.ended, "an ended session takes no further attempt"
        self.attempt += 1
        self.node, self.instance_id = node, instance_id
        return self.attempt

    def abandon(self) -> None:
        """Give the current attempt up: what still comes of it counts no more."""
        self.node = self.instance_id = ""

    def on_frame(self, node: str, instance_id: str, frame: Frame) -> Verdict:
        """Raises InvalidMessage for tokens that do not unpack."""
        if self.failure is not None or (node, instance_id, frame.attempt) != (
            self.node,
            self.instance_id,
            self.attempt,
        ):
            return Verdict.STRANGER
        tokens = unpack_tokens(frame.tokens)
        here = len(self.journal)
        if frame.index > here:
            return Verdict.GAP
        fresh = tokens[here - frame.index :]
        stale = frame.index + len(tokens) < here
        if self.finish is not None or stale or not (fresh or frame.finish):
            return Verdict.REPEAT
        self._take_in(fresh, frame)
        return Verdict.ACCEPTED

    def fail(self, error: StokerError) -> None:
        """End without a finish; the first end counts."""
        if not self.ended:
            self.failure = error

    def take(self) -> Sequence[int]:
        """The accepted tokens that were not taken yet."""
        fresh = self.journal[self._taken :]
        self._taken = len(self.journal)
        return fresh

    def _take_in(self, fresh: Sequence[int], frame: Frame) -> None:
        if len(self.journal) + len(fresh) > self._tokens_max:
            self.fail(EngineFailed(f"the instance generated more than {self._tokens_max} tokens"))
            return
        if len(self.journal) + len(fresh) - self._taken > self._buffer_max:
            self.fail(ClientTooSlow(f"more than {self._buffer_max} tokens wait for the client"))
            return
        self.journal.extend(fresh)
        if frame.finish in (Finish.STOP, Finish.LENGTH):
            self.finish = frame.finish
        elif frame.finish is not None:
            self.fail(EngineFailed(frame.error or "the instance reports an error"))

"""An instance's open token streams, sans I/O: what to admit, what to send, what to send again.

Frames are kept until the gateway acks them and sent again RESEND_AFTER_S after its acks stopped advancing; a
gateway that has not acked for GATEWAY_LEASE_S loses its requests. Times are passed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from stoker_contracts.codec import pack_tokens, unpack_tokens
from stoker_contracts.inference import (
    GATEWAY_LEASE_S,
    KEEPALIVE_S,
    RESEND_AFTER_S,
    TOKENS_AHEAD_MAX,
    Accepted,
    Ack,
    Cancel,
    Finish,
    Frame,
    Frames,
    Generate,
    GenerateReply,
    Refused,
    RefusedReason,
    Wanted,
)
from stoker_worker.engines.base import EngineOutput, EngineRequest

_REMEMBERED_MAX = 4096
"""Ended attempts that are still recognised when `generate` is repeated."""
_RETRY_AFTER_MS = 100
_ERROR_CHARS_MAX = 2000


@dataclass(slots=True)
class _Stream:
    request_id: str
    attempt: int
    gateway_id: str
    base: int  # index of tokens[0]; everything before is acked
    tokens: list[int] = field(default_factory=list)  # not yet acked
    finish: Finish | None = None
    error: str = ""
    unacked_since_s: float = 0.0  # when what is unacked was first sent, sent again, or last partly acked

    @property
    def unacked(self) -> bool:
        return bool(self.tokens) or self.finish is not None

    @property
    def end(self) -> int:
        return self.base + len(self.tokens)

    def frame(self, start: int) -> Frame:
        return Frame(
            request_id=self.request_id,
            attempt=self.attempt,
            index=start,
            tokens=pack_tokens(self.tokens[start - self.base :]),
            finish=self.finish,
            error=self.error,
        )


@dataclass(frozen=True, slots=True)
class Outgoing:
    gateway_id: str
    frames: tuple[Frame, ...]


class Streams:
    """slots: requests in the engine at once.

    Methods return what the caller must do: requests to add, keys to abort, frames to send.
    """

    def __init__(self, *, slots: int, now_s: float) -> None:
        self._slots = slots
        self._streams: dict[str, _Stream] = {}
        self._ended: OrderedDict[str, bool] = OrderedDict()  # → whether its gateway acked all of it
        self._lease_s: dict[str, float] = {}
        self._kept_alive_s: dict[str, float] = {}
        self._idle_since_s = now_s
        self.arrivals = 0
        self.finishes = 0
        self.stopping = False
        self.ready = False

    @staticmethod
    def key(request_id: str, attempt: int) -> str:
        return f"{request_id}/{attempt}"

    @property
    def running(self) -> int:
        return sum(1 for s in self._streams.values() if s.finish is None)

    @property
    def open(self) -> int:
        """Streams with anything left to produce or to be acked."""
        return len(self._streams)

    @property
    def room(self) -> int:
        return max(0, self._slots - self.running) if self.ready and not self.stopping else 0

    def idle_ms(self, now_s: float) -> int:
        return 0 if self._streams or not self.ready else int((now_s - self._idle_since_s) * 1e3)

    def became_ready(self, now_s: float) -> None:
        self.ready, self._idle_since_s = True, now_s

    def generate(self, message: Generate, now_s: float) -> tuple[GenerateReply, EngineRequest | None]:
        """Admit once per (request, attempt), never beyond the slots."""
        key = self.key(message.request_id, message.attempt)
        if key in self._streams or key in self._ended:
            self._lease_s[message.gateway_id] = now_s
            return Accepted(room=self.room), None
        if self.stopping:
            return Refused(reason=RefusedReason.STOPPING), None
        if message.generated:
            return Refused(reason=RefusedReason.UNSUPPORTED, message="this engine cannot resume a request"), None
        if self.room == 0:
            return Refused(reason=RefusedReason.BUSY, retry_after_ms=_RETRY_AFTER_MS), None
        request = EngineRequest(key, unpack_tokens(message.prompt), message.sampling, message.cache_salt)
        self._streams[key] = _Stream(
            message.request_id, message.attempt, message.gateway_id, base=len(message.generated) // 4
        )
        self._lease_s[message.gateway_id] = now_s
        self._kept_alive_s.setdefault(message.gateway_id, now_s)
        self.arrivals += 1
        return Accepted(room=self.room), request

    def produced(self, outputs: Iterable[EngineOutput], now_s: float) -> tuple[list[Outgoing], list[str]]:
        """What one engine step made → (frames to send now, keys to abort)."""
        fresh: dict[str, list[Frame]] = {}
        abort = []
        for output in outputs:
            stream = self._streams.get(output.key)
            if stream is None or stream.finish is not None:
                continue
            start = stream.end
            if not stream.unacked:
                stream.unacked_since_s = now_s
            stream.tokens.extend(output.tokens)
            stream.finish, stream.error = output.finish, output.error[:_ERROR_CHARS_MAX]
            if stream.finish is None and len(stream.tokens) > TOKENS_AHEAD_MAX:
                stream.finish = Finish.ERROR
                stream.error = f"the gateway is {TOKENS_AHEAD_MAX} tokens behind"
                abort.append(output.key)
            if stream.finish is not None:
                self.finishes += 1
            fresh.setdefault(stream.gateway_id, []).append(stream.frame(start))
        return self._outgoing(fresh, now_s), abort

    def ack(self, message: Ack, now_s: float) -> list[Outgoing]:
        """Frames to send now: errors for attempts that are no more here, lest their gateway waits for ever."""
        self._lease_s[message.gateway_id] = now_s
        gone: list[Frame] = []
        for wanted in message.wanted:
            key = self.key(wanted.request_id, wanted.attempt)
            stream = self._streams.get(key)
            if stream is None and not self._ended.get(key, False):
                gone.append(_gone(wanted))
            if stream is None or stream.gateway_id != message.gateway_id:
                continue
            if wanted.next > stream.base:
                done = min(wanted.next, stream.end) - stream.base
                del stream.tokens[:done]
                stream.base += done
                stream.unacked_since_s = now_s  # progress: what remains was sent moments ago
            if stream.finish is not None and wanted.next > stream.end:
                self._end(key, now_s, acked=True)
        return self._outgoing({message.gateway_id: gone}, now_s) if gone else []

    def cancel(self, message: Cancel, now_s: float) -> list[str]:
        """Keys to abort in the engine."""
        key = self.key(message.request_id, message.attempt)
        stream = self._streams.get(key)
        if stream is None:
            # A cancel may overtake its generate's repeat; it must not be admitted later.
            self._remember(key)
            return []
        running = stream.finish is None
        self.finishes += running
        self._end(key, now_s)
        return [key] if running else []

    def tick(self, now_s: float, *, link_up_since_s: float = 0.0) -> tuple[list[Outgoing], list[str]]:
        """Called a few times a second → (frames to send again, and keepalives; keys whose gateway is gone).

        link_up_since_s: of this process's own link; while it is down no gateway can be heard, and no lease runs.
        """
        abort = []
        gateways = {s.gateway_id for s in self._streams.values()}
        lapsed = {g for g in gateways if now_s - max(self._lease_s[g], link_up_since_s) > GATEWAY_LEASE_S}
        for key, stream in list(self._streams.items()):
            if stream.gateway_id in lapsed:
                if stream.finish is None:
                    abort.append(key)
                    self.finishes += 1
                self._end(key, now_s)
        for gone in set(self._lease_s) - (gateways - lapsed):
            self._lease_s.pop(gone)
            self._kept_alive_s.pop(gone, None)
        again: dict[str, list[Frame]] = {}
        for stream in self._streams.values():
            if stream.unacked and now_s - stream.unacked_since_s >= RESEND_AFTER_S:
                stream.unacked_since_s = now_s
                again.setdefault(stream.gateway_id, []).append(stream.frame(stream.base))
        for gateway_id in gateways - lapsed:
            if now_s - self._kept_alive_s.get(gateway_id, 0.0) >= KEEPALIVE_S:
                again.setdefault(gateway_id, [])
        return self._outgoing(again, now_s), abort

    def _outgoing(self, frames: dict[str, list[Frame]], now_s: float) -> list[Outgoing]:
        """Split so that a message stays well below its limit."""
        limit = Frames.LIMIT_BYTES // 2
        outgoing = []
        for gateway_id, all_frames in frames.items():
            self._kept_alive_s[gateway_id] = now_s
            batch: list[Frame] = []
            size = 0
            for frame in all_frames:
                frame_size = len(frame.tokens) + 256
                if batch and size + frame_size > limit:
                    outgoing.append(Outgoing(gateway_id, tuple(batch)))
                    batch, size = [], 0
                batch.append(frame)
                size += frame_size
            outgoing.append(Outgoing(gateway_id, tuple(batch)))
        return outgoing

    def _end(self, key: str, now_s: float, *, acked: bool = False) -> None:
        del self._streams[key]
        self._remember(key, acked=acked)
        if not self._streams:
            self._idle_since_s = now_s

    def _remember(self, key: str, *, acked: bool = False) -> None:
        self._ended[key] = acked
        while len(self._ended) > _REMEMBERED_MAX:
            self._ended.popitem(last=False)


def _gone(wanted: Wanted) -> Frame:
    return Frame(
        request_id=wanted.request_id,
        attempt=wanted.attempt,
        index=wanted.next,
        finish=Finish.ERROR,
        error=f"the instance gave the request up: it heard no ack for {GATEWAY_LEASE_S:g} s",
    )

"""Messages on the path of a request: msgpack, token ids as packed little-endian uint32."""

from __future__ import annotations

from typing import ClassVar, Literal

from stoker_contracts.codec import LIMIT_BYTES_MAX, Contract, OpenEnum


class Sampling(Contract, frozen=True):
    """How to choose tokens; field meanings and ranges as in OpenAI's and vLLM's APIs. Validated by the gateway."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Generate(Contract, frozen=True):
    """Gateway → instance, on `instance.<node>.<id>.generate`; answered Accepted or Refused.

    Retry-safe: a repeat of the same (request_id, attempt) is answered Accepted again and admitted once.
    """

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    LIMIT_BYTES: ClassVar[int] = LIMIT_BYTES_MAX

    request_id: str
    attempt: int  # from 1; only the gateway creates attempts
    gateway_id: str
    prompt: bytes  # packed tokens
    sampling: Sampling
    generated: bytes = b""  # packed tokens that earlier attempts produced
    cache_salt: str = ""
    budget_ms: int = 0  # time left when sent; 0: none given


class Accepted(Contract, frozen=True, tag="accepted"):
    """Instance → gateway. room: further requests it would admit now."""

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    room: int


class RefusedReason(OpenEnum):
    BUSY = "busy"
    STOPPING = "stopping"
    UNSUPPORTED = "unsupported"  # e.g. generated tokens sent to an engine that cannot resume
    UNKNOWN = "unknown"


class Refused(Contract, frozen=True, tag="refused"):
    """Instance → gateway. The request was not admitted and will produce no frames."""

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    reason: RefusedReason
    retry_after_ms: int = 0
    message: str = ""


GenerateReply = Accepted | Refused


class Finish(OpenEnum):
    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    UNKNOWN = "unknown"


class Frame(Contract, frozen=True):
    """Tokens index … index + n − 1 of one (request, attempt), in order, kept and sent again until acked.

    `index` counts generated tokens of the whole request from 0, earlier attempts' included.
    A finish is acked by `next` = index + n + 1: it counts as one token more.
    """

    request_id: str
    attempt: int
    index: int
    tokens: bytes = b""
    finish: Finish | None = None
    error: str = ""


class Frames(Contract, frozen=True):
    """Instance → gateway, on `gateway.<id>.frames`: what one engine step made for this gateway.

    Also the keepalive: sent at least every 500 ms, empty if need be, while the gateway has a request here.
    Retry-safe: the gateway accepts a token once, if it is the next index of its recorded attempt and instance.
    """

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    LIMIT_BYTES: ClassVar[int] = LIMIT_BYTES_MAX

    node: str
    instance_id: str
    frames: tuple[Frame, ...] = ()
    room: int = 0
    steps: int = 0  # engine steps since start; stuck for 30 s with work in hand is a hang


class Wanted(Contract, frozen=True):
    request_id: str
    attempt: int
    next: int  # the first index not yet received


class Ack(Contract, frozen=True):
    """Gateway → instance every 250 ms for its open requests there: also the gateway's lease (5 s). Retry-safe."""

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    LIMIT_BYTES: ClassVar[int] = LIMIT_BYTES_MAX

    gateway_id: str
    wanted: tuple[Wanted, ...]


class Cancel(Contract, frozen=True):
    """Gateway → instance: stop and forget this attempt. Retry-safe; unknown attempts are ignored."""

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    request_id: str
    attempt: int


ACK_INTERVAL_S = 0.25
RESEND_AFTER_S = 0.5
KEEPALIVE_S = 0.5
GATEWAY_LEASE_S = 5.0
TOKENS_AHEAD_MAX = 4096
INSTANCE_SILENCE_S = 3.0
"""A gateway counts an instance as lost after this long without a frame, while its own link was up throughout."""
STEP_HANG_S = 30.0

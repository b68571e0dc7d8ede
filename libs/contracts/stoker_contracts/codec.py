"""Encoding of messages: JSON for control, msgpack for tokens; unknown fields ignored, sizes limited."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import msgspec

from stoker_core.errors import InvalidMessage, MessageTooLarge

LIMIT_BYTES_MAX = 768 * 1024
"""No message type may declare more: NATS refuses payloads over 1 MB, headers included."""


class OpenEnum(StrEnum):
    """An enum that decodes values of a newer version as `unknown` instead of failing."""

    @classmethod
    def _missing_(cls, value: object) -> OpenEnum:
        return cls("unknown") if value != "unknown" else super()._missing_(value)


class Contract(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message. Subclasses say in their docstring who sends it and whether a retry is safe."""

    FORMAT: ClassVar[Literal["json", "msgpack"]] = "json"
    LIMIT_BYTES: ClassVar[int] = 64 * 1024


@cache
def _json_decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


@cache
def _msgpack_decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


_JSON = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Encoder()


def encode(message: Contract, *, subject: str = "") -> bytes:
    """Bytes of `message`. Raises MessageTooLarge over the limit of its type."""
    data = _MSGPACK.encode(message) if message.FORMAT == "msgpack" else _JSON.encode(message)
    if len(data) > message.LIMIT_BYTES:
        raise MessageTooLarge(subject or type(message).__name__, len(data), message.LIMIT_BYTES)
    return data


def decode(kind: Any, data: bytes) -> Any:
    """A message of `kind` (a Contract or a union of them). Raises InvalidMessage naming the field."""
    first: type[Contract] = get_args(kind)[0] if get_args(kind) else kind
    decoder = _msgpack_decoder(kind) if first.FORMAT == "msgpack" else _json_decoder(kind)
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InvalidMessage(f"{getattr(kind, '__name__', kind)}: {error}") from error


def pack_tokens(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32, four bytes each."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> Sequence[int]:
    """Inverse of pack_tokens. Raises InvalidMessage if the length is no multiple of four."""
    if len(data) % 4:
        raise InvalidMessage(f"packed tokens have {len(data)} bytes, no multiple of 4")
    ids = array("I")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def spelled_out(value: Any) -> Any:
    """Plain data with every field: a message leaves defaults out, but what is kept or shown must not change with a later default."""
    if isinstance(value, msgspec.Struct):
        return {name: spelled_out(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [spelled_out(item) for item in value]
    return msgspec.to_builtins(value)

"""Encoding of messages and token ids."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_contracts.codec import Contract, OpenEnum, decode, encode, pack_tokens, unpack_tokens
from stoker_core.errors import InvalidMessage, MessageTooLarge


class Colour(OpenEnum):
    RED = "red"
    UNKNOWN = "unknown"


class Thing(Contract, frozen=True):
    LIMIT_BYTES: ClassVar[int] = 64
    name: str
    colour: Colour = Colour.RED


class Packed(Contract, frozen=True, tag="packed"):
    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    tokens: bytes


class Empty(Contract, frozen=True, tag="empty"):
    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"


@given(st.lists(st.integers(0, 2**32 - 1)))
@settings(max_examples=50, deadline=None)
def test_tokens_survive_packing(ids: list[int]) -> None:
    assert list(unpack_tokens(pack_tokens(ids))) == ids


def test_tokens_are_packed_as_little_endian_uint32() -> None:
    assert pack_tokens([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_packed_tokens_of_a_wrong_length_are_invalid(length: int) -> None:
    with pytest.raises(InvalidMessage, match=f"{length} bytes"):
        unpack_tokens(b"x" * length)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_uint32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([token])


def test_unknown_fields_are_ignored() -> None:
    assert decode(Thing, b'{"name": "a", "more": {"x": [1]}}') == Thing(name="a")


def test_unknown_enum_values_become_unknown() -> None:
    assert decode(Thing, b'{"name": "a", "colour": "ultraviolet"}').colour is Colour.UNKNOWN


def test_an_enum_value_of_another_type_is_invalid() -> None:
    with pytest.raises(InvalidMessage):
        decode(Thing, b'{"name": "a", "colour": ["red"]}')


def test_an_enum_without_unknown_is_a_mistake() -> None:
    class Closed(OpenEnum):
        ONE = "one"

    with pytest.raises(ValueError, match="not a valid"):
        Closed("two")


def test_defaults_are_not_sent() -> None:
    assert encode(Thing(name="a")) == b'{"name":"a"}'


@pytest.mark.parametrize(
    ("data", "named"), [(b'{"name": 1}', "name"), (b"{}", "name"), (b"[]", "Thing"), (b"{", "Thing"), (b"", "Thing")]
)
def test_what_does_not_fit_is_invalid_and_the_field_is_named(data: bytes, named: str) -> None:
    with pytest.raises(InvalidMessage, match=named):
        decode(Thing, data)


def test_a_union_is_decoded_by_tag_in_its_members_format() -> None:
    for message in (Packed(tokens=b"1234"), Empty()):
        assert decode(Packed | Empty, encode(message)) == message
    with pytest.raises(InvalidMessage):
        decode(Packed | Empty, b"\x81\xa4type\xa5other")


def test_a_message_over_its_limit_is_refused_with_its_numbers() -> None:
    fits = Thing(name="x" * (64 - len('{"name":""}')))
    assert len(encode(fits)) == 64
    with pytest.raises(MessageTooLarge, match="Thing has 65 bytes; the limit is 64"):
        encode(Thing(name=fits.name + "x"))

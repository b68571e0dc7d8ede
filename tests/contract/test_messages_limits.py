"""Every message type: declared limits, docstrings, and what is encoded decodes to the same."""

from __future__ import annotations

import inspect
import types
import typing
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.messages import EXAMPLES, PARTS, declared

from stoker_contracts import subjects
from stoker_contracts.codec import LIMIT_BYTES_MAX, Contract, OpenEnum, decode, encode, pack_tokens
from stoker_contracts.inference import TOKENS_AHEAD_MAX, Ack, Frame, Frames, Generate, Sampling, Wanted
from stoker_core.errors import InvalidMessage, MessageTooLarge

MESSAGES = [kind for kind in declared() if kind not in PARTS]
each = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(), JSON_VALUES, max_size=3)
    if isinstance(hint, type) and issubclass(hint, Contract):
        return instances(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        type(None): st.none(),
    }
    return simple[hint]


def instances(kind: type[Contract]) -> st.SearchStrategy[Contract]:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in msgspec.structs.fields(kind)]
    return st.fixed_dictionaries({name: values(hints[name]) for name in names}).map(lambda given: kind(**given))


@each
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_encoded_decodes_to_the_same(kind: type[Contract], data: st.DataObject) -> None:
    message = data.draw(instances(kind))
    assert decode(kind, encode(message)) == message


@each
def test_the_limit_is_below_what_nats_takes_and_is_enforced(kind: type[Contract]) -> None:
    assert 0 < kind.LIMIT_BYTES <= LIMIT_BYTES_MAX == 768 * 1024
    hints = typing.get_type_hints(kind)
    growing = next((f.name for f in msgspec.structs.fields(kind) if hints[f.name] in (str, bytes)), None)
    if growing is None:
        return  # nothing in it grows
    example = next(e for e in EXAMPLES if type(e) is kind)
    filler: str | bytes = "x" * kind.LIMIT_BYTES if hints[growing] is str else b"x" * kind.LIMIT_BYTES
    with pytest.raises(MessageTooLarge) as caught:
        encode(msgspec.structs.replace(example, **{growing: filler}), subject="stoker.v1.x")
    assert caught.value.limit_bytes == kind.LIMIT_BYTES
    assert caught.value.subject == "stoker.v1.x"


@each
@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"null", b'{"type":"elsewhere"}', b"{", b"\x80", b"\xc1"])
def test_garbage_is_an_invalid_message(kind: type[Contract], data: bytes) -> None:
    if not any(field.required for field in msgspec.structs.fields(kind)) and data in (b"\x80",):
        return
    with pytest.raises(InvalidMessage):
        decode(kind, data)


@pytest.mark.parametrize("kind", declared(), ids=lambda kind: kind.__name__)
def test_enums_of_messages_are_open_ones(kind: type[Contract]) -> None:
    for name, hint in typing.get_type_hints(kind).items():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and issubclass(part, Enum):
                assert issubclass(part, OpenEnum), f"{kind.__name__}.{name}"
                assert part("never heard of") is part("unknown")


def test_the_longest_request_that_a_gateway_may_send_fits() -> None:
    """A context of 128 Ki tokens, prompt and generated together, is the longest the walking protocol carries whole."""
    message = Generate(
        request_id="r" * 64,
        attempt=9,
        gateway_id="g" * 64,
        prompt=pack_tokens(range(128 * 1024)),
        sampling=Sampling(max_tokens=4096, stop_token_ids=tuple(range(64))),
        generated=pack_tokens(range(4096)),
        cache_salt="s" * 64,
    )
    assert len(encode(message)) < LIMIT_BYTES_MAX


def test_the_most_that_one_instance_resends_to_one_gateway_fits_for_32_requests() -> None:
    frames = tuple(
        Frame(request_id=f"{n:064d}", attempt=9, index=10**9, tokens=pack_tokens(range(TOKENS_AHEAD_MAX)))
        for n in range(32)
    )
    assert len(encode(Frames(node="n" * 63, instance_id="i" * 64, frames=frames))) < LIMIT_BYTES_MAX


def test_an_ack_of_4096_open_requests_fits() -> None:
    wanted = tuple(Wanted(request_id=f"{n:064d}", attempt=9, next=10**9) for n in range(4096))
    assert len(encode(Ack(gateway_id="g" * 64, wanted=wanted))) < LIMIT_BYTES_MAX


def test_every_subject_begins_with_the_version_and_is_well_formed() -> None:
    for name, member in inspect.getmembers(subjects):
        if inspect.isfunction(member) and member.__module__ == subjects.__name__:
            subject = member(*("name-1" for _ in inspect.signature(member).parameters))
        elif isinstance(member, str) and name.isupper() and name not in ("PREFIX", "EVENTS_STREAM"):
            subject = member
        else:
            continue
        assert subject.startswith("stoker.v1."), name
        assert all(subject.split(".")), name


def test_no_two_subjects_are_the_same() -> None:
    built = [
        member(*("x" for _ in inspect.signature(member).parameters))
        for _, member in inspect.getmembers(subjects, inspect.isfunction)
    ]
    assert len(set(built)) == len(built)

"""Messages of the previous and the next minor version are understood: kept bytes decode to what they meant."""

from __future__ import annotations

import json

import msgspec
import pytest
from tests.support.messages import (
    EXAMPLES,
    FIXTURES,
    PARTS,
    all_enums_unknown,
    declared,
    fixture,
    from_fixture,
)

from stoker_contracts import PROTOCOL_MAJOR
from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.control import CommandReply, LocateReply, RegisterReply, TermReply
from stoker_contracts.inference import GenerateReply
from stoker_contracts.keeping import FromKeeper, ToKeeper
from stoker_contracts.storage import LeaseReply

UNIONS = (CommandReply, TermReply, RegisterReply, LocateReply, GenerateReply, LeaseReply, ToKeeper, FromKeeper)
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)


def test_every_message_type_has_an_example_and_kept_fixtures() -> None:
    assert PROTOCOL_MAJOR == 1
    kinds = {type(example) for example in EXAMPLES}
    assert kinds | set(PARTS) == set(declared()), "add an example (and its fixtures) for a new message type"
    for example in EXAMPLES:
        for version in ("v1_0", "next_minor"):
            assert fixture(example, version).exists(), f"keep {encode(example)!r} as {fixture(example, version).name}"
    kept = {path.stem for path in (FIXTURES / "v1_0").iterdir()} - {"defaults"}
    assert kept == {kind.__name__ for kind in kinds}, "a fixture outlives its type: the other version still sends it"


@by_name
def test_version_1_0_is_understood(example: Contract) -> None:
    assert decode(type(example), from_fixture(example, "v1_0")) == example


@by_name
def test_what_version_1_0_understands_is_sent(example: Contract) -> None:
    def fields(data: bytes) -> object:
        return msgspec.json.decode(data) if example.FORMAT == "json" else msgspec.msgpack.decode(data)

    def covers(now: object, then: object) -> bool:
        if isinstance(then, dict):
            return isinstance(now, dict) and all(key in now and covers(now[key], then[key]) for key in then)
        if isinstance(then, list):
            return isinstance(now, list) and len(now) == len(then) and all(map(covers, now, then))
        return bool(now == then)

    assert covers(fields(encode(example)), fields(from_fixture(example, "v1_0"))), "a field was renamed or retyped"


@by_name
def test_the_next_minor_version_is_understood(example: Contract) -> None:
    """Its fixtures bear a field that 1.0 does not know in every struct, and enum values that 1.0 does not know."""
    data = from_fixture(example, "next_minor")
    assert b"added_later" in data
    assert decode(type(example), data) == all_enums_unknown(example)


@pytest.mark.parametrize("version", ["v1_0", "next_minor"])
@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_answers_are_told_apart_by_their_tag(union: object, version: str) -> None:
    members = set(getattr(union, "__args__", ()))
    examples = [example for example in EXAMPLES if type(example) in members]
    assert len(examples) == len(members)
    for example in examples:
        assert type(decode(union, from_fixture(example, version))) is type(example)


def test_defaults_never_change_because_they_are_not_sent() -> None:
    """Senders omit a field at its default, so the reader fills in its own: both must be the same for ever."""
    kept = json.loads((FIXTURES / "v1_0" / "defaults.json").read_text())
    now = {
        kind.__name__: {
            field.name: msgspec.to_builtins(field.default)
            for field in msgspec.structs.fields(kind)
            if field.default is not msgspec.NODEFAULT
        }
        for kind in declared()
    }
    for name, defaults in kept.items():
        assert defaults == {field: json.loads(json.dumps(now[name].get(field, "gone"))) for field in defaults}, name

"""The error taxonomy."""

from __future__ import annotations

import pytest

from stoker_core import errors
from stoker_core.errors import MessageTooLarge, NoCapacity, StokerError


def family(kind: type[StokerError]) -> list[type[StokerError]]:
    return [kind] + [member for child in kind.__subclasses__() for member in family(child)]


ERRORS = [kind for kind in family(StokerError) if kind.__module__ == errors.__name__]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in ERRORS]
    assert sorted(set(codes)) == sorted(codes)
    assert all("code" in vars(kind) for kind in ERRORS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_says_what_went_wrong_in_its_docstring(kind: type[StokerError]) -> None:
    first = (kind.__doc__ or "").strip().splitlines()[0]
    assert first.endswith(".")
    assert first[0].isupper()


def test_every_error_of_the_package_is_in_this_one_module() -> None:
    strangers = [kind for kind in family(StokerError) if not kind.__module__.startswith(errors.__name__)]
    assert [kind for kind in strangers if kind.__module__.startswith("stoker_")] == []


def test_the_docstring_is_the_message_when_none_is_given() -> None:
    assert str(errors.Disconnected()) == "There is no connection to the message bus."
    assert str(errors.Disconnected("cut off")) == "cut off"


def test_fields_carry_the_particulars() -> None:
    error = MessageTooLarge("a.b", 10, 5)
    assert (error.subject, error.size_bytes, error.limit_bytes) == ("a.b", 10, 5)
    assert error.message == "message on a.b has 10 bytes; the limit is 5"
    assert NoCapacity("m", 10, "no device").message == "no capacity for 'm' within 10 ms (no device)"


@pytest.mark.parametrize(
    ("kind", "retryable"),
    [
        (errors.Disconnected, True),
        (errors.BusRefused, False),
        (errors.BusLost, False),
        (errors.DatabaseUnavailable, True),
        (errors.InvalidMessage, False),
        (errors.StaleTerm, False),
        (errors.Overloaded, True),
    ],
)
def test_only_what_may_pass_is_retryable(kind: type[StokerError], retryable: bool) -> None:
    assert kind.retryable is retryable

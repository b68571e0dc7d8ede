"""Takes a JSON object apart field by field; whatever is wrong is refused by the field's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from stoker_core.errors import InvalidRequest

_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}


def decode_object(body: bytes) -> dict[str, Any]:
    """Raises InvalidRequest unless `body` is one JSON object."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


class Fields:
    """A JSON object whose fields are taken out one by one. null counts as absent."""

    def __init__(self, raw: dict[str, Any], path: str = "") -> None:
        self._raw = dict(raw)
        self._path = path

    def name(self, field: str) -> str:
        return f"{self._path}.{field}" if self._path else field

    def refuse(self, field: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self.name(field)}: {why}", self.name(field))

    def take(self, field: str) -> Any:
        return self._raw.pop(field, None)

    def string(self, field: str) -> str | None:
        value = self.take(field)
        if value is not None and not isinstance(value, str):
            raise self.refuse(field, f"must be a string, not {kind_of(value)}")
        return value

    def required_string(self, field: str) -> str:
        value = self.string(field)
        if not value:
            raise self.refuse(field, "is required")
        return value

    def boolean(self, field: str, default: bool = False) -> bool:
        value = self.take(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(field, f"must be a boolean, not {kind_of(value)}")
        return value

    def integer(self, field: str, *, least: int, most: int) -> int | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not int:
            raise self.refuse(field, f"must be an integer, not {value if type(value) is float else kind_of(value)}")
        if not least <= value <= most:
            raise self.refuse(field, f"must be from {least} to {most}")
        return value

    def number(self, field: str, default: float, *, least: float, most: float, open_below: bool = False) -> float:
        value = self.take(field)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self.refuse(field, f"must be a number, not {kind_of(value)}")
        if not least <= value <= most or (open_below and value == least):
            raise self.refuse(field, f"must be {'over' if open_below else 'from'} {least:g} to {most:g}")
        return float(value)

    def strings(self, field: str, *, most: int) -> tuple[str, ...]:
        """An array of at most `most` strings; empty if it is absent."""
        value = self.take(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refuse(field, "must be an array of strings")
        if len(value) > most:
            raise self.refuse(field, f"must have at most {most} elements")
        return tuple(value)

    def only(self, field: str, *allowed: object) -> None:
        """Take a parameter that is not supported: only values under which it does nothing may be given."""
        value = self.take(field)
        if value is None or any(_same(value, one) for one in allowed):
            return
        raise self.refuse(field, "is not supported" if not allowed else f"only {_listed(allowed)} is supported")

    def refuse_rest(self) -> None:
        for field, value in self._raw.items():
            if value is not None:
                raise self.refuse(field, "is not a parameter of this route")


def _same(value: object, other: object) -> bool:
    """Equal as JSON: true is not 1, but 0 is 0.0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _listed(values: Sequence[object]) -> str:
    return " or ".join(msgspec.json.encode(value).decode() for value in values)

"""Subjects and headers as NATS understands them, checked before they leave the process.

A malformed subject is a mistake in Stoker, so it is a ValueError and not a StokerError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_TOKEN = re.compile(r"[^\s.*>]+")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'+^_`|~.-]+")
_HEADER_LINES_BYTES = len("NATS/1.0\r\n\r\n")


def check_subject(subject: str) -> None:
    """Raises ValueError unless `subject` can be published on: non-empty tokens, no wildcards."""
    if not all(_TOKEN.fullmatch(token) for token in subject.split(".")):
        raise ValueError(f"{subject!r} is no subject to publish on")


def check_pattern(pattern: str) -> None:
    """Raises ValueError unless `pattern` can be subscribed to: `*` is one whole token, `>` the last one."""
    *head, last = pattern.split(".")
    if not all(t == "*" or _TOKEN.fullmatch(t) for t in head) or not (last in ("*", ">") or _TOKEN.fullmatch(last)):
        raise ValueError(f"{pattern!r} is no subject to subscribe to")


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` gets messages on `subject`. `*` is one token, `>` one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def headers_bytes(headers: Mapping[str, str] | None) -> int:
    """Bytes that headers take of a message's size limit. Raises ValueError for a name or value that cannot be sent."""
    if not headers:
        return 0
    size = _HEADER_LINES_BYTES
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or value != value.strip() or "\r" in value or "\n" in value:
            raise ValueError(f"header {name!r} cannot be sent with value {value!r}")
        size += len(name) + len(value.encode()) + len(": \r\n")
    return size

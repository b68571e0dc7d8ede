"""Identifiers as an injected part.

Random bits come from `os.urandom`: instances are forked from one zygote, so a generator seeded before
the fork (`random`, numpy) would give every child the same ids.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Protocol

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


class Ids(Protocol):
    def new(self, prefix: str) -> str:
        """A fresh id, `prefix-…`, safe as one token of a NATS subject. Never repeats."""
        ...


def jitter() -> float:
    """A fresh random number, at least 0 and below 1."""
    return int.from_bytes(os.urandom(2), "big") / 0x10000


def _base32(value: int, length: int) -> str:
    digits = []
    for _ in range(length):
        value, digit = divmod(value, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


class RandomIds:
    """Time-sortable ids: 45 bits of milliseconds, then 60 random bits."""

    def new(self, prefix: str) -> str:
        millis = time.time_ns() // 1_000_000
        return f"{prefix}-{_base32(millis, 9)}{_base32(int.from_bytes(os.urandom(8), 'big') >> 4, 12)}"


class SequentialIds:
    """`prefix-1`, `prefix-2`, …: for tests that compare ids."""

    def __init__(self) -> None:
        self._next = itertools.count(1)

    def new(self, prefix: str) -> str:
        return f"{prefix}-{next(self._next)}"

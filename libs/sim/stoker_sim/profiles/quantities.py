"""The kinds of numbers that profiles hold, and their bounds. What is outside is a slip of the unit, not a machine."""

from __future__ import annotations

from typing import Annotated

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a profile: unknown keys are refused."""


Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=10**16)]
BytesPerSecond = Annotated[float, msgspec.Meta(ge=1e6, le=1e13)]
"""From 1 MB/s to 10 TB/s."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Ratio = Annotated[float, msgspec.Meta(ge=0.001, le=1000)]

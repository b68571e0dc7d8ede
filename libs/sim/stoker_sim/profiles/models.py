"""Models of a simulated cluster."""

from __future__ import annotations

from typing import Annotated

import msgspec

from stoker_sim.profiles.hardware import numbered
from stoker_sim.profiles.quantities import Bytes, Count, Name, Part


class ModelProfile(Part, frozen=True):
    """Models that are alike: different registrations of one size, none of which shares bytes with another.

    weight_bytes, kv_bytes_per_token, kv_cache_bytes: of all ranks together; the last is what an instance has for its slots.  ranks: devices that an instance needs (tensor parallel).
    prefill_tokens_per_s, decode_s_per_token: of an instance on all of its ranks, one request at a time, on devices of ratio 1.
    context_tokens: prompt and answer together.  slots: requests that an instance serves at once.
    """

    name: Name
    count: Count
    weight_bytes: Bytes
    kv_bytes_per_token: Annotated[int, msgspec.Meta(ge=0, le=10**9)]
    kv_cache_bytes: Bytes
    prefill_tokens_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e8)]
    decode_s_per_token: Annotated[float, msgspec.Meta(gt=0, le=60)]
    context_tokens: Annotated[int, msgspec.Meta(ge=2, le=10_000_000)] = 2048
    ranks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8

    @property
    def names(self) -> list[str]:
        """Of its models."""
        return numbered(self.name, self.count)

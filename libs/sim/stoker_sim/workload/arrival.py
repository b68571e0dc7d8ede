"""One request to come, and how a trace is brought to another rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from stoker_core.errors import InvalidWorkload


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request that reaches the cluster at_s seconds after the workload's beginning.

    model: its name.  prompt_tokens, output_tokens: at least 1 each.
    """

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


def at_rate(read: Callable[[], Iterator[Arrival]], rate_per_s: float) -> Iterator[Arrival]:
    """The same arrivals, with all gaps between them stretched or shrunk alike so that their mean rate is rate_per_s.

    read: begins anew at each call. It is called twice, once to learn the rate, so that no arrival is kept.
    The rate of n arrivals is n - 1 gaps over the time from the first to the last.
    Raises InvalidWorkload if the trace has no rate: fewer than two moments.
    """
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise InvalidWorkload(f"a rate of {rate_per_s:g} requests per second is none")
    count, first_s, last_s = 0, 0.0, 0.0
    for arrival in read():
        if not count:
            first_s = arrival.at_s
        last_s = arrival.at_s
        count += 1
    if last_s <= first_s:
        raise InvalidWorkload("a trace whose arrivals all come at one moment has no rate that could be changed")
    factor = (count - 1) / (last_s - first_s) / rate_per_s
    for arrival in read():
        yield msgspec.structs.replace(arrival, at_s=(arrival.at_s - first_s) * factor)

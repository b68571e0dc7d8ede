"""Mooncake's traces: a JSON object a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from stoker_core.errors import InvalidTrace
from stoker_sim.dice import Dice
from stoker_sim.workload.arrival import Arrival
from stoker_sim.workload.popularity import Popularity
from stoker_sim.workload.reading import TOKENS_MAX, lines

_YEAR_MS = 366 * 24 * 3600 * 1000

Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """timestamp: milliseconds since the trace's beginning.  hash_ids: of the prompt's blocks; prefixes are not simulated."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=_YEAR_MS)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[int] = []


def read_mooncake(path: Path, popularity: Popularity, dice: Dice) -> Iterator[Arrival]:
    """The file's requests, at the times that it says. It names no models: they are drawn by popularity. 0 tokens are read as 1.

    Raises InvalidTrace; a line that is earlier than the one before is refused, not sorted: a file may be larger than memory.
    Source: github.com/kvcache-ai/Mooncake, mooncake_trace.jsonl and FAST25-release.
    """
    decoder = msgspec.json.Decoder(_Line)
    last_ms = 0.0
    for number, text in lines(path):
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            named = re.search(r"field `([^`]+)`|`\$\.(\w+)", str(error))
            column = (named.group(1) or named.group(2)) if named else ""
            raise InvalidTrace(str(path), str(error), line=number, column=column) from error
        if line.timestamp < last_ms:
            reason = "is earlier than the line before; sort the file"
            raise InvalidTrace(str(path), reason, line=number, column="timestamp")
        last_ms = line.timestamp
        yield Arrival(
            at_s=line.timestamp / 1e3,
            model=popularity.draw(dice),
            prompt_tokens=max(line.input_length, 1),
            output_tokens=max(line.output_length, 1),
        )

"""Azure's functions of 2019: how often each was called in each minute of a day."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from stoker_core.errors import InvalidTrace, InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload.arrival import Arrival
from stoker_sim.workload.lengths import Lengths
from stoker_sim.workload.reading import Table

MINUTES_MAX = 1440
CELLS_MAX = 20_000_000
"""Models × minutes: each is counted in 8 bytes."""
CALLS_MAX = 100_000_000
"""Of one function in one minute; more are taken for a damaged file."""
ARRIVALS_PER_MINUTE_MAX = 1_000_000
"""Those of one minute are drawn together, about 100 bytes each."""

_MINUTE = re.compile(r"(?:minute_)?([1-9][0-9]{0,3})")
_NAMES = ("HashOwner", "HashApp", "HashFunction", "Trigger")


def read_azure_functions(
    path: Path, models: Sequence[str], lengths: Lengths, dice: Dice, *,
    first_minute: int = 1, minutes: int | None = None, rate_per_s: float | None = None,
) -> Iterator[Arrival]:  # fmt: skip
    """The calls of the file's functions as requests; within its minute each comes at a time drawn by chance.

    models: the file's first function is the first model, the next the next, and after the last model again the first.
    first_minute, minutes: the part of the day to take, from 1; None: to its end. It begins at 0.
    rate_per_s: the mean rate wanted. Every count is multiplied alike and a fraction of a call rounded by chance, so that the
    shape stays as it was; None: as in the file.
    Columns: HashFunction, '1' to '1440' (as published) or 'minute_1' to 'minute_1440'; HashOwner, HashApp, Trigger may be there.
    The file is read whole before the first request comes, for it is ordered by function: 8 bytes for each model and minute stay.
    Raises InvalidTrace and InvalidWorkload.
    Source: github.com/Azure/AzurePublicDataset, AzureFunctionsDataset2019; Shahrad et al., USENIX ATC'20.
    """
    counts = _counts(path, models, first_minute, minutes)
    total = sum(map(sum, counts))
    if not total:
        raise InvalidTrace(str(path), "has no calls in the minutes that were asked for")
    factor = 1.0
    if rate_per_s is not None:
        if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
            raise InvalidWorkload(f"a rate of {rate_per_s:g} requests per second is none")
        factor = rate_per_s * 60.0 * len(counts) / total
    times, tokens = dice.child("times"), dice.child("lengths")
    for minute, calls in enumerate(counts):
        for at_s, index in _minute(path, calls, factor, times):
            prompt_tokens, output_tokens = lengths.draw(tokens)
            yield Arrival(
                at_s=60.0 * minute + at_s,
                model=models[index],
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )


def _counts(path: Path, models: Sequence[str], first_minute: int, minutes: int | None) -> list[array[int]]:
    """Calls by minute and model."""
    table = Table(path)
    columns = _minute_columns(table)
    last = len(columns) if minutes is None else first_minute + minutes - 1
    if not 1 <= first_minute <= last <= len(columns):
        raise InvalidWorkload(f"minutes {first_minute} to {last} are not within 1 to {len(columns)}, which {path} has")
    wanted = columns[first_minute - 1 : last]
    if not models or len(models) * len(wanted) > CELLS_MAX:
        raise InvalidWorkload(f"{len(models):,} models × {len(wanted)} minutes are not from 1 to {CELLS_MAX:,}")
    counts = [array("Q", bytes(8 * len(models))) for _ in wanted]
    for function, (line, row) in enumerate(table):
        model = function % len(models)
        for minute, place in enumerate(wanted):
            if (text := row[place]) != "0":
                counts[minute][model] += table.whole(line, table.columns[place], text, CALLS_MAX)
    return counts


def _minute_columns(table: Table) -> list[int]:
    """Where minutes 1, 2, … stand. Raises InvalidTrace if one before the last is missing, or there is none."""
    places: dict[int, int] = {}
    for place, name in enumerate(table.columns):
        match = _MINUTE.fullmatch(name)
        if match and int(match.group(1)) <= MINUTES_MAX:
            if int(match.group(1)) in places:
                raise table.wrong(table.header_line, name, "is a minute that stands in the header twice")
            places[int(match.group(1))] = place
        elif name not in _NAMES:
            raise table.wrong(
                table.header_line, name, f"is unknown; known are {', '.join(_NAMES)} and minutes 1 to {MINUTES_MAX}"
            )
    if "HashFunction" not in table.columns:
        raise table.wrong(table.header_line, "HashFunction", "is missing")
    for minute in range(1, max(places, default=1) + 1):
        if minute not in places:
            raise table.wrong(table.header_line, f"minute_{minute}", "is missing")
    return [places[minute] for minute in sorted(places)]


def _minute(path: Path, calls: array[int], factor: float, dice: Dice) -> list[tuple[float, int]]:
    """Times within one minute, in seconds, in order, each with the index of its model; ties by that index."""
    numbers = [(index, _rounded(count * factor, dice)) for index, count in enumerate(calls) if count]
    total = sum(number for _, number in numbers)
    if total > ARRIVALS_PER_MINUTE_MAX:
        raise InvalidTrace(
            str(path), f"{total:,} requests in one minute are over {ARRIVALS_PER_MINUTE_MAX:,}; ask for a lower rate"
        )
    return sorted((60.0 * dice.unit(), index) for index, number in numbers for _ in range(number))


def _rounded(value: float, dice: Dice) -> int:
    """Up or down by chance, so that its mean is value. A whole number draws nothing."""
    whole = math.floor(value)
    return whole if value == whole else whole + dice.chance(value - whole)

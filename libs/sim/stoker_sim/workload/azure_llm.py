"""Azure's LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from stoker_core.errors import InvalidTrace
from stoker_sim.dice import Dice
from stoker_sim.workload.arrival import Arrival
from stoker_sim.workload.popularity import Popularity
from stoker_sim.workload.reading import Table

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure_llm(path: Path, popularity: Popularity, dice: Dice) -> Iterator[Arrival]:
    """The file's requests; the first comes at 0. It names no models: they are drawn by popularity.

    Both published years are read, without and with a time zone; without one it is UTC, microseconds count.
    Raises InvalidTrace; a row that is earlier than the one before is refused, not sorted: a file may be larger than memory.
    Source: github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023 and 2024.
    """
    table = Table(path)
    time, prompt, output = table.places(_COLUMNS)
    first: datetime | None = None
    last_s = 0.0
    for line, row in table:
        moment = _moment(table, line, row[time])
        first = first or moment
        at_s = (moment - first).total_seconds()
        if at_s < last_s:
            raise InvalidTrace(
                str(path), "is earlier than the row before; sort the file", line=line, column=_COLUMNS[0]
            )
        last_s = at_s
        yield Arrival(
            at_s=at_s,
            model=popularity.draw(dice),
            prompt_tokens=table.tokens(line, _COLUMNS[1], row[prompt]),
            output_tokens=table.tokens(line, _COLUMNS[2], row[output]),
        )


def _moment(table: Table, line: int, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise table.wrong(line, _COLUMNS[0], f"{text[:40]!r} is no date and time") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

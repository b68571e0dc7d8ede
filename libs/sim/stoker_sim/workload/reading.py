"""Lines and rows of trace files, one at a time; what is wrong with one is said with its file, line and column."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from stoker_core.errors import InvalidTrace

LINE_BYTES_MAX = 1 << 20
TOKENS_MAX = 10_000_000
"""More of them in one prompt or answer are taken for a damaged file."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, without their ends, each with its number from 1. Raises InvalidTrace."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    raise InvalidTrace(str(path), f"is longer than {LINE_BYTES_MAX:,} bytes", line=number)
                try:
                    # A byte order mark may stand at a file's beginning, and nowhere else.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InvalidTrace(str(path), "is not UTF-8", line=number) from error
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InvalidTrace(str(path), error.strerror or "cannot be read") from error


class Table:
    """A CSV file with a header. Iterating gives each row's line and fields, as many as there are columns."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises InvalidTrace, as iterating does."""
        self.path = path
        self._lines = lines(path)
        number, header = next(self._lines, (0, ""))
        if not number:
            raise InvalidTrace(str(path), "is empty: there is no header")
        self.columns = [name.strip() for name in self._fields(number, header)]
        for index, name in enumerate(self.columns):
            if name in self.columns[:index]:
                raise InvalidTrace(str(path), "stands in the header twice", line=number, column=name)
        self.header_line = number

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        for number, text in self._lines:
            fields = self._fields(number, text)
            if len(fields) != len(self.columns):
                raise InvalidTrace(
                    str(self.path), f"has {len(fields)} fields; the header has {len(self.columns)}", line=number
                )
            yield number, fields

    def places(self, needed: Sequence[str], others: Sequence[str] = ()) -> list[int]:
        """Where each needed column stands. others: columns that may be there and are not read.

        Raises InvalidTrace naming the first column that is missing, or that is neither.
        """
        for name in needed:
            if name not in self.columns:
                raise self.wrong(self.header_line, name, f"is missing; the columns are {', '.join(self.columns[:20])}")
        for name in self.columns:
            if name not in needed and name not in others:
                raise self.wrong(self.header_line, name, f"is unknown; known are {', '.join((*needed, *others))}")
        return [self.columns.index(name) for name in needed]

    def whole(self, line: int, column: str, text: str, most: int) -> int:
        """A whole number from 0 to `most`. Raises InvalidTrace."""
        if text.isascii() and text.isdigit() and len(text) <= 18 and (value := int(text)) <= most:
            return value
        raise self.wrong(line, column, f"{text[:40]!r} is no whole number from 0 to {most:,}")

    def tokens(self, line: int, column: str, text: str) -> int:
        """A count of tokens; 0 is read as 1, for every request has a prompt and gets an answer. Raises InvalidTrace."""
        return max(self.whole(line, column, text.strip(), TOKENS_MAX), 1)

    def wrong(self, line: int, column: str, reason: str) -> InvalidTrace:
        return InvalidTrace(str(self.path), reason, line=line, column=column)

    def _fields(self, number: int, text: str) -> list[str]:
        try:
            return next(csv.reader((text,), strict=True))
        except csv.Error as error:
            raise InvalidTrace(str(self.path), f"is no CSV: {error}", line=number) from error

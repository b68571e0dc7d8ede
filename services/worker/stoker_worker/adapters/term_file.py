"""The term in a file, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path


class TermFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> int:
        try:
            return int(self._path.read_text())
        except FileNotFoundError:
            return 0

    def save(self, term: int) -> None:
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(str(term))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

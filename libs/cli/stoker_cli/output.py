"""Output shared by the commands: tables and JSON to standard output, notes and errors to standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def table(content: Table) -> None:
    """Print a table; where there is no terminal it is as wide as it needs, so that lines stay whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    console.print(content)


def as_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def error(message: str) -> None:
    sys.stderr.write(f"stoker: {message}\n")

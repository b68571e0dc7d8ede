"""Rules about the source as a whole: who imports whom, and what is spelt where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "libs").rglob("*.py"), *(ROOT / "services").rglob("*.py")])

# Calls that read a clock or draw random numbers, and the few places that may: everything else gets a Clock or Ids.
BANNED_CALLS = {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow", "uuid.uuid4", "uuid4"}  # fmt: skip
BANNED_MODULES = {"random", "uuid", "numpy.random"}
ALLOWED = {
    "libs/core/stoker_core/clock.py": {"datetime.now"},
    "libs/core/stoker_core/ids.py": {"time.time_ns"},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def clocks_and_dice(module: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            yield node.lineno, dotted(node.func)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in BANNED_MODULES | {"numpy"}:
            yield from (
                (node.lineno, f"{node.module}.{name.name}")
                for name in node.names
                if node.module != "numpy" or name.name == "random"
            )


def strings(module: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 50


def test_import_rules_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_subjects_are_spelt_in_the_contracts_only() -> None:
    found = [
        f"{relative(path)}:{line}"
        for path in SOURCES
        if "stoker_contracts" not in path.parts
        for line, text in strings(tree(path))
        if "stoker.v1" in text
    ]
    assert found == []


def test_clocks_and_random_numbers_are_injected() -> None:
    found = [
        f"{relative(path)}:{line} {what}"
        for path in SOURCES
        for line, what in clocks_and_dice(tree(path))
        if what not in ALLOWED.get(relative(path), ())
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["import random", "import uuid", "from random import choice", "from numpy import random", "import time\ntime.time()", "datetime.now(UTC)"],
)  # fmt: skip
def test_the_search_for_clocks_and_random_numbers_finds_them(code: str) -> None:
    assert list(clocks_and_dice(ast.parse(code)))


def test_no_file_is_longer_than_500_lines() -> None:
    long = [f"{relative(path)}: {lines}" for path in SOURCES if (lines := path.read_text().count("\n")) > 500]
    assert long == []

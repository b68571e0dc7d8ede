"""The commands of `stoker sim`: each is the function of a module of its own name here.

These modules are imported whenever `stoker` runs, so they import what is heavy inside their functions.
"""

from __future__ import annotations

from importlib import import_module

import typer

NAMES: tuple[str, ...] = ("run", "paper", "scale")

app = typer.Typer(no_args_is_help=True, help="Compare policies on simulated clusters; every command takes --json FILE.")
for name in NAMES:
    app.command(name)(getattr(import_module(f"{__package__}.{name}"), name))

"""What every benchmark writes: the command, the machine, figures, and the raw rounds they come from."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from stoker_core import __version__


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": _gpu_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def medians(rounds: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The median of each name over the rounds that measured it; a name that none measured is left out."""
    found = {name: [r[name] for r in rounds if name in r] for name in names}
    return {name: round(median(values), 4) for name, values in found.items() if values}


def write(path: Path, *, figures: Mapping[str, float], rounds: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object; ratios in `figures` are medians of per-round ratios."""
    report = {
        "command": shlex.join(["stoker", *sys.argv[1:]]),
        "version": __version__,
        "machine": machine(),
        "figures": dict(figures),
        "rounds": [dict(r) for r in rounds],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpu_name() -> str | None:
    from stoker_worker.devices import cuda_devices

    gpus = cuda_devices()
    return gpus[0].name if gpus else None

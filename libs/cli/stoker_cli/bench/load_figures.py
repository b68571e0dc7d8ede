"""From measurements to figures: ratios within each round, medians over rounds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from rich.table import Table

from stoker_cli.bench.report import medians

T = TypeVar("T")
Round = dict[str, float]

DEVICES = ("fio", "sequential")
"""What measures the raw device."""
LABELS = {
    "fio": "raw device, fio libaio, depth 32 × 1 MiB",
    "sequential": "raw device, one O_DIRECT read of 16 MiB after the other",
    "memcpy": "memcpy from pinned memory to the GPU",
    "stoker": "Stoker, cold",
    "verified": "Stoker, cold, every chunk checked against its digest",
    "pool": "Stoker, from the warm pool",
    "runai": "run:ai model streamer",
    "safetensors": "safetensors, tensors cloned to be kept",
    "safetensors_mapped": "safetensors, left in the page cache, every page read",
    "fastsafetensors": "fastsafetensors",
    "torch": "torch.load",
    "instanttensor": "InstantTensor",
}


def rotated(names: Sequence[T], number: int) -> list[T]:
    """The order of round `number`: each round begins one further on."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def balanced(names: Sequence[T], number: int) -> list[T]:
    """The order of round `number`, so that in as many rounds as there are names (twice as many, if odd) everyone follows
    everybody else equally often: what one leaves behind, a disk's burst used up or memory given back, favours nobody.

    Source: E. J. Williams, "Experimental designs balanced for the estimation of residual effects of treatments", 1949.
    """
    size = len(names)
    first = [index // 2 if index % 2 == 0 else size - 1 - index // 2 for index in range(size)]
    order = [names[(at + number) % size] for at in first]
    return order[::-1] if size % 2 and number // size % 2 else order


def with_ratios(measured: Mapping[str, float], file_bytes: int) -> Round:
    """Add speeds, and Stoker's speed over every other's of the same round, to a round's `NAME_s`."""
    found = dict(measured)
    for name in LABELS:
        if f"{name}_s" in found:
            found[f"{name}_gb_per_s"] = file_bytes / found[f"{name}_s"] / 1e9
    devices = [found[f"{name}_gb_per_s"] for name in DEVICES if f"{name}_gb_per_s" in found]
    if devices:
        found["device_gb_per_s"] = max(devices)
    if "stoker_gb_per_s" not in found:
        return found
    found["cold_gb_per_s"] = found["stoker_gb_per_s"]
    for name in (*LABELS, "device"):
        if f"{name}_gb_per_s" in found and name not in ("stoker", "pool", "memcpy"):
            found[f"cold_over_{name}"] = found["cold_gb_per_s"] / found[f"{name}_gb_per_s"]
    if "memcpy_gb_per_s" in found:
        found |= _gpu_ratios(found)
    return found


def _gpu_ratios(found: Mapping[str, float]) -> Round:
    ratios = {"disk_to_gpu_gb_per_s": found["stoker_gb_per_s"], "dram_to_gpu_gb_per_s": found["pool_gb_per_s"]}
    ratios["dram_to_gpu_over_memcpy"] = found["pool_gb_per_s"] / found["memcpy_gb_per_s"]
    if "device_gb_per_s" in found:
        ratios["disk_to_gpu_over_disk"] = found["stoker_gb_per_s"] / found["device_gb_per_s"]
    return ratios


def figures(rounds: Sequence[Round]) -> Round:
    """Medians of everything that rounds measured; the worst of what has to stay below a limit."""
    found = medians(rounds, sorted({name for one in rounds for name in one}))
    extra = [value for one in rounds for name, value in one.items() if name in _STOKER_MEMORY]
    if extra:
        found["extra_memory_mib"] = round(max(extra), 1)
    return found


_STOKER_MEMORY = tuple(f"{name}_memory_mib" for name in ("stoker", "verified", "pool"))


def table(rounds: Sequence[Round]) -> Table:
    """One line a contestant: medians, and the median of the rounds' ratios."""
    found = figures(rounds)
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("")
    for header in ("SECONDS", "GB/S", "STOKER COLD ÷ IT", "MEMORY MiB", "PAGE CACHE MiB"):
        shown.add_column(header, justify="right")
    for name, label in LABELS.items():
        if f"{name}_s" in found:
            shown.add_row(
                label,
                f"{found[f'{name}_s']:.3f}",
                f"{found[f'{name}_gb_per_s']:.2f}",
                _cell(found, f"cold_over_{name}", "{:.2f}"),
                _cell(found, f"{name}_memory_mib", "{:.0f}"),
                _cell(found, f"{name}_page_cache_mib", "{:.0f}"),
            )
    return shown


def sweep_figures(rounds: Sequence[Round]) -> Round:
    """Medians of each case, its size and number of tensors in the name."""
    return {
        f"{_case(*case)}_{name}": value
        for case, own in _cases(rounds).items()
        for name, value in figures(own).items()
        if name in _SWEPT
    }


_SWEPT = ("stoker_s", "cold_gb_per_s", "device_gb_per_s", "cold_over_device", "pool_ready_ms", "extra_memory_mib")


def sweep_table(rounds: Sequence[Round]) -> Table:
    """One line per size and number of tensors."""
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("GB", "TENSORS", "COLD s", "s PER GB", "GB/S", "÷ DEVICE", "POOL ms", "ms PER GB"):
        shown.add_column(header, justify="right")
    for (gb, tensors), own in _cases(rounds).items():
        found = figures(own)
        shown.add_row(
            f"{gb:.1f}",
            f"{tensors:,.0f}",
            f"{found['stoker_s']:.3f}",
            f"{found['stoker_s'] / gb:.3f}",
            f"{found['cold_gb_per_s']:.2f}",
            f"{found['cold_over_device']:.2f}",
            f"{found['pool_ready_ms']:.1f}",
            f"{found['pool_ready_ms'] / gb:.1f}",
        )
    return shown


def _cases(rounds: Sequence[Round]) -> dict[tuple[float, float], list[Round]]:
    cases: dict[tuple[float, float], list[Round]] = {}
    for one in rounds:
        cases.setdefault((one["checkpoint_gb"], one["tensors"]), []).append(one)
    return cases


def _case(gb: float, tensors: float) -> str:
    return f"gb_{round(gb, 1):g}_tensors_{tensors:.0f}"


def _cell(found: Mapping[str, float], name: str, shape: str) -> str:
    return shape.format(found[name]) if name in found else ""

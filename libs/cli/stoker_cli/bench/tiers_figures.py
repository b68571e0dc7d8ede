"""From measurements to the figures of `stoker bench tiers`: ratios within each round, medians over rounds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from stoker_cli.bench.report import medians

Round = dict[str, float]

WAYS = {
    "s3": "from S3, node empty, to a client that has read every page",
    "peer": "from a peer's DRAM, node empty",
    "ssd": "from the node's SSD, pool empty",
    "dram": "from the node's pool",
    "stepwise": "from S3 onto the SSD first, then through the pool",
    "fetch": "stage alone: S3 to memory",
    "write": "stage alone: memory to SSD",
    "loopback": "bare loopback TCP, memfd to memory",
}
ORDER = ("s3", "fetch", "write", "stepwise", "ssd", "dram", "peer", "loopback")
"""Of measuring: what is compared lies close together, as a machine has better and worse moments."""
FANS = {
    "fan1": "1 receiver, capped links",
    "chain2": "2 receivers in a chain",
    "chain4": "4 receivers in a chain",
    "star2": "2 receivers in a star",
    "star4": "4 receivers in a star",
}
STAGES = ("fetch", "write", "dram")
"""Of a cold load: they make up a pipeline, whose slowest part bounds it."""


AS_PLANNED_MIN = 0.999


def with_ratios(measured: Mapping[str, float], model_bytes: int, fan_bytes: int) -> Round:
    """Add speeds and the ratios of the same round to a round's `NAME_s`; what lacks a part is left out.

    fan_bytes: of the model that is fanned out; speeds are those of the last receiver.
    """
    found = dict(measured)
    for names, size_bytes in ((WAYS, model_bytes), (FANS, fan_bytes)):
        for name in names:
            if f"{name}_s" in measured:
                found[f"{name}_gb_per_s"] = size_bytes / measured[f"{name}_s"] / 1e9
    if all(f"{stage}_s" in measured for stage in STAGES):
        slowest_s = found["slowest_stage_s"] = max(measured[f"{stage}_s"] for stage in STAGES)
        for way, ratio in (("s3", "pipelined"), ("stepwise", "stepwise")):
            if f"{way}_s" in measured:
                found[f"{ratio}_over_slowest_stage"] = measured[f"{way}_s"] / slowest_s
    pairs = [("s3_over_fetch", "s3", "fetch"), ("peer_over_loopback", "loopback", "peer")]  # the latter of speeds
    pairs += [(f"{fan}_over_1", fan, "fan1") for fan in FANS if fan != "fan1"]
    for ratio, over, under in pairs:
        if f"{over}_s" in measured and f"{under}_s" in measured:
            found[ratio] = measured[f"{over}_s"] / measured[f"{under}_s"]
    return found


def figures(rounds: Sequence[Round]) -> Round:
    """Medians of everything that rounds measured."""
    return medians(rounds, sorted({name for one in rounds for name in one}))


def unplanned(found: Mapping[str, float]) -> list[str]:
    """A line for each fan-out in which receivers took chunks from others than they were meant to."""
    return [
        f"{FANS[name]}: {found[f'{name}_as_planned']:.0%} of the bytes came from whom they were meant to"
        for name in FANS
        if found.get(f"{name}_as_planned", 1.0) < AS_PLANNED_MIN
    ]


_RATIOS = {
    "pipelined_over_slowest_stage": "from S3, pipelined ÷ slowest stage",
    "stepwise_over_slowest_stage": "from S3, step by step ÷ slowest stage",
    "s3_over_fetch": "from S3, pipelined ÷ S3 to memory alone",
    "peer_over_loopback": "peer ÷ bare loopback, speeds",
    "chain2_over_1": "chain of 2 ÷ 1 receiver",
    "chain4_over_1": "chain of 4 ÷ 1 receiver",
    "star2_over_1": "star of 2 ÷ 1 receiver",
    "star4_over_1": "star of 4 ÷ 1 receiver",
}


def table(rounds: Sequence[Round]) -> Table:
    """One line for each way, medians and extremes; then the ratios, medians of the rounds' own."""
    found = figures(rounds)
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("")
    for header in ("SECONDS", "FROM", "TO", "GB/S"):
        shown.add_column(header, justify="right")
    for name, label in (WAYS | FANS).items():
        if f"{name}_s" in found:
            seconds = [one[f"{name}_s"] for one in rounds if f"{name}_s" in one]
            numbers = [found[f"{name}_s"], min(seconds), max(seconds)]
            shown.add_row(label, *(f"{number:.3f}" for number in numbers), f"{found[f'{name}_gb_per_s']:.2f}")
    for name, label in _RATIOS.items():
        if name in found:
            ratios = [one[name] for one in rounds if name in one]
            shown.add_row(label, *(f"{number:.2f}" for number in (found[name], min(ratios), max(ratios))), "")
    return shown

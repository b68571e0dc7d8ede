"""What a simulation measured, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from stoker_sim.cluster import Measured
    from stoker_sim.cluster.paper import Compared, Row

_COLUMNS = ("mean s", "P50", "P95", "P99", "TTFT P50", "P99 ", "in time", "starts", "moved", "preempted", "dram/ssd/peer/remote", "GPU")  # fmt: skip


def measured(named: Sequence[tuple[str, Measured]]) -> Table:
    table = Table("policy", *_COLUMNS, box=None, header_style="bold")
    for name, one in named:
        table.add_row(name, *_cells(one))
    return table


def paper(rows: Sequence[Row]) -> Table:
    """ "paper": the mean that it gives for that model and dataset, whatever the rate."""
    table = Table("model", "lengths", "RPS", "policy", "paper", *_COLUMNS, box=None, header_style="bold")
    before = None
    for row in rows:
        first = row.workload != before
        before = row.workload
        what = (row.model, row.dataset, f"{row.rate_per_s:g}") if first else ("", "", "")
        published = "" if row.published_mean_s is None else f"{row.published_mean_s:g}"
        table.add_row(*what, row.policy, published, *_cells(row.measured))
    return table


def compared(all_of_them: Sequence[Compared]) -> Table:
    table = Table("model", "lengths", "RPS", "Stoker's P99 s", "best other", "its P99 s", "ratio", box=None, header_style="bold")  # fmt: skip
    for one in all_of_them:
        table.add_row(
            one.model,
            one.dataset,
            f"{one.rate_per_s:g}",
            f"{one.stoker_s:.2f}",
            one.best_other,
            f"{one.best_other_s:.2f}",
            f"{one.ratio:.3f}",
        )
    return table


def _cells(one: Measured) -> tuple[str, ...]:
    reads = "/".join(str(one.reads.get(tier, 0)) for tier in ("dram", "ssd", "peer", "remote"))
    return (
        f"{one.startup_mean_s:.2f}",
        f"{one.startup_p50_s:.2f}",
        f"{one.startup_p95_s:.2f}",
        f"{one.startup_p99_s:.2f}",
        f"{one.ttft_p50_s:.2f}",
        f"{one.ttft_p99_s:.2f}",
        f"{one.within_timeout:.1%}",
        str(one.starts),
        str(one.migrations),
        str(one.preemptions),
        reads,
        f"{one.gpu_utilisation:.0%}",
    )

"""`stoker sim paper`: the cluster test of the ServerlessLLM paper, with every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

QUICK_REQUESTS = 200


def paper(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest models, 200 requests: seconds.")] = False,
    seed: Annotated[int, typer.Option(help="Of requests, and of policies that choose by chance.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Of each row.")] = 800,
    policies: Annotated[str, typer.Option(help="By comma. Default: all.")] = "",
    keep_alive_s: Annotated[
        float, typer.Option(min=0, help="How long an idle instance stays, unless others need its GPU.")
    ] = 60.0,
    plots: Annotated[Path | None, typer.Option(help="Draw P99 over rate into this directory, as PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Run the paper's cluster test in virtual time: 4 servers with 4 A40, OPT in three sizes, bursts with a CV of 8.

    \b
    stoker sim paper --quick
    stoker sim paper --json paper.json --plots .

    Startup latency is the time from a request's arrival until an instance works on it, and what it later loses by being
    preempted or moved. docs/evaluation.md says what is simulated how, and where it differs from the paper.
    """
    from statistics import median

    from stoker_cli import output
    from stoker_cli.bench import report
    from stoker_cli.sim import tables
    from stoker_sim.cluster import POLICIES, Setup
    from stoker_sim.cluster import paper as test

    chosen = [name for name in policies.split(",") if name] or list(POLICIES)
    rows = list(
        test.run(
            seed=seed,
            requests=min(requests, QUICK_REQUESTS) if quick else requests,
            models=("opt-6.7b",) if quick else (),
            policies=chosen,
            setup=Setup(keep_alive_s=keep_alive_s),
        )
    )
    output.table(tables.paper(rows))
    compared = test.compare(rows)
    figures: dict[str, float] = {}
    if compared:
        ratios = [one.ratio for one in compared]
        figures = {
            "worst_p99_over_best_other": round(max(ratios), 4),
            "median_p99_over_best_other": round(median(ratios), 4),
            "workloads": len(ratios),
            "workloads_lower": sum(1 for ratio in ratios if ratio < 1),
        }
        typer.echo("")
        output.table(tables.compared(compared))
        typer.echo(
            f"\nStoker's P99 is lower in {figures['workloads_lower']} of {len(ratios)} workloads; "
            f"at worst it is {max(ratios):.3f} × the best other policy's"
        )
    if plots:
        from stoker_cli.sim.plots import draw

        for path in draw(rows, plots):
            typer.echo(f"wrote {path}")
    if json_file:
        rounds = [
            {"policy": row.policy, "model": row.model, "dataset": row.dataset, "rps": row.rate_per_s}
            | ({} if row.published_mean_s is None else {"published_mean_s": row.published_mean_s})
            | row.measured.row()
            for row in rows
        ]
        report.write(json_file, figures=figures, rounds=rounds)

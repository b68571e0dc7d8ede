"""`stoker sim run`: one workload on a cluster of one's own, under one or several policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    profile: Annotated[
        str, typer.Option(help="paper, h100, thousand, or a TOML file of machines, models and loaders.")
    ] = "paper",
    workload: Annotated[
        str,
        typer.Option(help="gamma, azure-shaped, azure-llm:FILE.csv, azure-functions:FILE.csv or mooncake:FILE.jsonl."),
    ] = "gamma",
    policy: Annotated[str, typer.Option(help="By comma: random, cache, shepherd, serverlessllm, stoker.")] = "stoker",
    seed: Annotated[int, typer.Option(help="Of requests, and of policies that choose by chance.")] = 1,
    rps: Annotated[float, typer.Option(help="Requests per second, of gamma and azure-shaped.")] = 0.8,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of each model's gaps, of gamma.")] = 8.0,
    zipf: Annotated[float, typer.Option(help="Exponent of the models' popularity; 0: all alike.")] = 0.0,
    duration_s: Annotated[float, typer.Option(help="Of gamma and azure-shaped.")] = 1800.0,
    lengths: Annotated[
        str, typer.Option(help="gsm8k, sharegpt, or a CSV file; a trace may bring its own.")
    ] = "sharegpt",
    loader: Annotated[str, typer.Option(help="One of the profile's. Default: that of the policy's system.")] = "",
    keep_alive_s: Annotated[float, typer.Option(min=0, help="How long an idle instance stays.")] = 60.0,
    share: Annotated[
        bool, typer.Option(help="Instances share a GPU where they fit; else each takes its GPUs whole.")
    ] = False,
    migrate: Annotated[bool, typer.Option("--migrate/--no-migrate", help="Whether Stoker may move requests.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Run a workload in virtual time; the same seed gives the same table.

    \b
    stoker sim run --policy serverlessllm,stoker --rps 1.4 --lengths gsm8k
    stoker sim run --profile h100 --share --workload azure-llm:AzureLLMInferenceTrace_conv.csv --zipf 1
    stoker sim run --profile mine.toml --workload azure-functions:inv.csv --policy stoker --no-migrate
    """
    from stoker_cli import output
    from stoker_cli.bench import report
    from stoker_cli.sim import tables
    from stoker_cli.sim.workloads import arrivals
    from stoker_sim.cluster import Setup, build
    from stoker_sim.dice import Dice
    from stoker_sim.profiles import load_profile

    loaded = load_profile(profile)
    setup = Setup(keep_alive_s=keep_alive_s, exclusive=not share, loader=loader, migrates=migrate)
    named = []
    for name in policy.split(","):
        requests = arrivals(
            workload,
            loaded,
            Dice(seed, "workload"),
            lengths=lengths,
            rate_per_s=rps,
            cv=cv,
            duration_s=duration_s,
            exponent=zipf,
        )
        named.append((name, build(loaded, name, seed=seed, setup=setup).run(requests)))
    output.table(tables.measured(named))
    if json_file:
        figures = {f"{name}_startup_p99_s": round(one.startup_p99_s, 4) for name, one in named}
        report.write(json_file, figures=figures, rounds=[{"policy": name} | one.row() for name, one in named])

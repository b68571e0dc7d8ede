"""`stoker sim scale`: how long the simulator and Stoker's policy take for a large cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scale(
    requests: Annotated[int, typer.Option(min=1, help="In all.")] = 1_000_000,
    duration_s: Annotated[float, typer.Option(min=1, help="Simulated, over which they come.")] = 3600.0,
    profile: Annotated[str, typer.Option(help="A built-in one or a TOML file.")] = "thousand",
    policy: Annotated[str, typer.Option(help="One of those of sim run.")] = "stoker",
    decide_s: Annotated[
        float,
        typer.Option(
            min=0, help="From a change until the policy is asked: all that changed until then is one decision."
        ),
    ] = 0.25,
    seed: Annotated[int, typer.Option(help="Of requests.")] = 1,
    migrate: Annotated[bool, typer.Option("--migrate/--no-migrate", help="Whether Stoker may move requests.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Simulate an hour of 1,000,000 requests to 10,000 models on 1,000 nodes, as Azure's functions are called, on one core.

    \b
    stoker sim scale --json scale.json
    stoker sim scale --requests 100000 --duration-s 360
    """
    import time

    from stoker_cli import output
    from stoker_cli.bench import report
    from stoker_cli.sim import tables
    from stoker_cli.sim.workloads import arrivals
    from stoker_sim.cluster import Setup, build
    from stoker_sim.cluster.floor import Physics
    from stoker_sim.dice import Dice
    from stoker_sim.profiles import load_profile

    loaded = load_profile(profile)
    begun_s = time.perf_counter()
    setup = Setup(exclusive=False, migrates=migrate, physics=Physics(decision_s=decide_s))
    world = build(loaded, policy, seed=seed, setup=setup)
    coming = arrivals(
        "azure-shaped",
        loaded,
        Dice(seed, "workload"),
        lengths="sharegpt",
        rate_per_s=requests / duration_s,
        cv=1.0,
        duration_s=duration_s,
        exponent=0.0,
    )
    measured = world.run(coming)
    wall_s = time.perf_counter() - begun_s
    figures = {
        "wall_s": round(wall_s, 1),
        "nodes": float(len(world.nodes)),
        "models": float(len(world.lines)),
        "requests": float(measured.requests),
        "starts": float(measured.starts),
        "decisions": float(measured.decisions),
        "simulated_s": round(measured.simulated_s, 1),
        "requests_per_s": round(measured.requests / wall_s, 1),
    }
    output.table(tables.measured([(policy, measured)]))
    typer.echo(
        f"{len(world.nodes):,} nodes, {len(world.lines):,} models, {measured.requests:,} requests, {measured.starts:,} starts "
        f"in {measured.simulated_s:,.0f} simulated seconds took {wall_s:.1f} s"
    )
    if json_file:
        report.write(json_file, figures=figures, rounds=[{"policy": policy} | measured.row()])

"""`stoker bench place`: how long a decision of the scheduler takes in a cluster of a thousand nodes, and in one of two thousand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from stoker_cli.bench.place_world import World

WARM_UP = 50
"""Decisions that are not counted: the first one puts every node where others find it."""


def place(
    nodes: Annotated[int, typer.Option(min=5, help="Nodes; measured with as many, and with twice as many.")] = 1000,
    devices: Annotated[int, typer.Option(min=8, max=64, help="GPUs of a node.")] = 8,
    models: Annotated[int, typer.Option(min=2000, help="Registered models.")] = 10_000,
    decisions: Annotated[int, typer.Option(min=50, help="Decisions of each size.")] = 2000,
    seed: Annotated[int, typer.Option(help="Decides the cluster and what is asked for.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time decisions: a node's status is applied as it comes, then a model is asked for, and the policy decides.

    \b
    stoker bench place --nodes 1000 --devices 8 --models 10000 --json place.json

    Of ten decisions one is for a model whose best place has no GPU free, and for which somebody has to move; the others are,
    in equal parts, for models that lie in DRAM, on SSDs, on nodes without room (so that peers give them), on no node, and for
    such that take 2, 4 or 8 GPUs. A fifth of the nodes is full of busy instances; of the others' GPUs a fifth is free and a
    fifth holds somebody idle. Rates of tiers, engine starts and migrations were observed on every node.
    The time is that of one thread on this machine, the status's views and the demand in it; sizes take turns.
    """
    from stoker_cli import output
    from stoker_cli.bench import report
    from stoker_cli.bench.place_world import World

    worlds = {}
    for count in (nodes, 2 * nodes):
        typer.echo(f"{count} nodes of {devices} GPUs, {models} models")
        worlds[count] = World(nodes=count, devices=devices, models=models, seed=seed)
    rounds = list(measure(worlds, decisions))
    found = figures(rounds, nodes)
    output.table(table(rounds))
    typer.echo("  ".join(f"{name} {value:g}" for name, value in found.items()))
    if json_file:
        report.write(json_file, figures=found, rounds=rounds)


def measure(worlds: Mapping[int, World], decisions: int) -> Iterator[dict[str, Any]]:
    """One round a decision: `nodes`, `kind` (what was asked for), `how` and `source` (what was decided), `ms`."""
    import gc
    from time import perf_counter

    from stoker_cli.bench.place_world import MIX

    gc.collect()
    gc.freeze()  # as a process does that has built what it keeps: else the collector walks all of it again and again
    try:
        for number in range(-WARM_UP, decisions):
            kind = MIX[number % len(MIX)]
            for nodes, world in worlds.items():
                model, apply = world.want(kind), world.delta()
                began_s = perf_counter()
                decision = world.decide(model, apply)
                took_s = perf_counter() - began_s
                world.follow(decision)
                if number >= 0:
                    option = None if decision.chosen is None else decision.options[decision.chosen]
                    yield {
                        "nodes": nodes,
                        "kind": kind,
                        "how": option.how if option else "",
                        "source": option.source.value if option else "",
                        "ms": round(took_s * 1000, 4),
                    }
    finally:
        gc.unfreeze()


def figures(rounds: Sequence[Mapping[str, Any]], nodes: int) -> dict[str, float]:
    """Of decisions among `nodes` nodes, and among twice as many. growth: of the 99th percentile."""
    small = [r["ms"] for r in rounds if r["nodes"] == nodes]
    large = [r["ms"] for r in rounds if r["nodes"] == 2 * nodes]
    p99, p99_double = percentile(small, 0.99), percentile(large, 0.99)
    return {
        "decision_ms_p50": round(percentile(small, 0.5), 4),
        "decision_ms_p99": round(p99, 4),
        "decision_ms_p99_double_nodes": round(p99_double, 4),
        "growth": round(p99_double / p99, 4),
    }


def table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Per size and kind: how many, what was decided how often, and how long it took."""
    from rich.table import Table

    content = Table(box=None, pad_edge=False)
    for name in ("nodes", "asked for", "decisions", "p50 ms", "p99 ms", "decided"):
        content.add_column(name)
    keys = dict.fromkeys((r["nodes"], r["kind"]) for r in rounds)
    for nodes, kind in sorted(keys, key=lambda key: key[0]):
        of = [r for r in rounds if (r["nodes"], r["kind"]) == (nodes, kind)]
        took = [r["ms"] for r in of]
        ways = Counter(f"{r['how']} {r['source']}".strip() or "nothing" for r in of)
        content.add_row(
            str(nodes),
            kind,
            str(len(of)),
            f"{percentile(took, 0.5):.2f}",
            f"{percentile(took, 0.99):.2f}",
            ", ".join(f"{way} {count}" for way, count in ways.most_common()),
        )
    return content


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 10_000) * len(ordered) // 10_000) - 1))]

"""`stoker bench tiers`: a model from S3, a peer, the SSD and DRAM until it is usable, beside what its way consists of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stoker_cli.bench.make_checkpoint import Checkpoint

FAN = "fan"
"""Stands for everything of the fan-out in --only."""
SPARE_BYTES = 2_000_000_000
"""Of memory: what the processes need for themselves."""
COPIES = 4
"""On the disk, at most: of three nodes, and of the stage that writes alone."""
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
}


def tiers(
    gb: Annotated[float, typer.Option(min=0.001, help="Size of the model, in 10⁹ bytes.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Everything is measured so often, interleaved.")] = 5,
    only: Annotated[
        str, typer.Option(help="By comma: s3, peer, ssd, dram, stepwise, fetch, write, loopback, fan. Default: all.")
    ] = "",
    fan_gb: Annotated[float, typer.Option(min=0.001, help="Size of the model that is fanned out.")] = 0.5,
    cap_mb: Annotated[
        float, typer.Option(min=1, help="Of each node in the fan-out: 10⁶ bytes per second in, and as many out.")
    ] = 200.0,
    work: Annotated[
        Path | None, typer.Option(help="Where files are made, and kept. Default: in STOKER_HOME, and removed.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare what clients get with the model's files once.")] = True,
    rest_s: Annotated[float, typer.Option(min=0, help="Seconds of rest before each measurement.")] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time a model's way to a client from every tier, beside the stages of that way alone, and its way to many nodes.

    Storage agents, NATS, PostgreSQL, a server of S3 and the client are processes of their own on this machine. The time is
    that from the client's request until it has read every page of every tensor. Needs --gb six times and --fan-gb six
    times of memory, and --gb five times of disk.

    \b
    stoker bench tiers --gb 1 --rounds 5 --json tiers.json
    stoker bench tiers --only s3,fetch,write,dram --rounds 3
    stoker bench tiers --only peer,loopback
    stoker bench tiers --only fan --fan-gb 0.5 --cap-mb 200

    Pipelined is s3 against the slowest of fetch (S3 to memory), write (memory to SSD) and dram (pool to client); stepwise
    brings the model onto the SSD first. In the fan-out nodes keep no copies on their SSDs, which are one disk here, and
    the time is that until the last receiver has all of the model in DRAM.
    """
    from stoker_cli import output
    from stoker_cli.bench import make_checkpoint, report, tiers_figures
    from stoker_cli.bench.tiers_run import Bench, Work

    names = choose([name for name in only.split(",") if name])
    fanned = any(name in tiers_figures.FANS for name in names)
    brought = any(name in tiers_figures.WAYS for name in names)
    need_memory(gb if brought else 0.0, fan_gb if fanned else 0.0)
    with _work(work) as directory:
        checkpoint = _model(directory, gb if brought else fan_gb)
        make_checkpoint.need_room(directory, COPIES * checkpoint.total_bytes)
        fan = _model(directory, fan_gb) if fanned else None
        files = Work(directory=directory, checkpoint=checkpoint, fan=fan)
        bench = Bench(files, names, cap_bytes_per_s=round(cap_mb * 1e6), say=typer.echo, rest_s=rest_s)
        measured = asyncio.run(bench.run(rounds, verify=verify))
    if fanned:
        typer.echo("fan-out: no copies on SSDs; every node's network is capped in each direction")
    found = tiers_figures.figures(measured)
    for line in tiers_figures.unplanned(found):
        typer.echo(line)
    output.table(tiers_figures.table(measured))
    if json_file:
        report.write(json_file, figures=found, rounds=measured)


def choose(only: Sequence[str]) -> list[str]:
    """What is measured of what is wanted (nothing: all), in the order of the first round. Raises SetupFailed for a name that there is not."""
    from stoker_cli.bench.tiers_figures import FANS, ORDER, WAYS
    from stoker_core.errors import SetupFailed

    unknown = [name for name in only if name not in (*WAYS, FAN)]
    if unknown:
        raise SetupFailed(f"--only {unknown[0]}: there are {', '.join((*WAYS, FAN))}")
    ways = [name for name in ORDER if not only or name in only]
    return [*ways, *(FANS if not only or FAN in only else ())]


def need_memory(gb: float, fan_gb: float) -> None:
    """Raises SetupFailed if memory is too small for the pools, buffers and the page cache that is to serve S3."""
    from stoker_core.errors import SetupFailed
    from stoker_storeagent.adapters.pool import available_bytes

    need, available = round((gb + fan_gb) * 6e9) + SPARE_BYTES, available_bytes()
    if available < need:
        raise SetupFailed(
            f"{need / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free; choose a smaller --gb or --fan-gb"
        )


def _model(work: Path, gb: float) -> Checkpoint:
    """A checkpoint that can be registered, below the root of the server of S3."""
    from stoker_cli.bench import make_checkpoint
    from stoker_cli.bench.tiers_run import BUCKET

    made = make_checkpoint.make(work / "s3" / BUCKET, round(gb * 1e9), None, pickles=False, progress=typer.echo)
    make_checkpoint.need_direct(made.files[0])
    (made.directory / "config.json").write_text(json.dumps(_CONFIG))
    (made.directory / "tokenizer.json").write_text("{}")
    return made


@contextlib.contextmanager
def _work(given: Path | None) -> Iterator[Path]:
    """Where files are made: the directory given, where models stay, or one of our own on the disk of STOKER_HOME."""
    from stoker_cli.settings import UpSettings
    from stoker_core.settings import load

    if given is not None:
        parent, models = given.absolute(), given.absolute() / "s3"
        models.mkdir(parents=True, exist_ok=True)
    else:
        parent, models = load(UpSettings).home, None
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="bt-", dir=parent))  # short: sockets lie below it
    try:
        if models is not None:
            (made / "s3").symlink_to(models)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)

"""`stoker bench load`: a checkpoint from the disk, and from the pool, beside the raw device and other loaders."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from stoker_cli.bench.load_figures import Round
    from stoker_cli.bench.make_checkpoint import Checkpoint

SWEEP_GB = (1.0, 2.0, 4.0, 8.0)
SWEEP_TENSORS = (100, 10_000)
SWEEP_CONTESTANTS = ("fio", "sequential", "stoker")


def load(
    gb: Annotated[float, typer.Option(min=0.001, help="Size of the checkpoint that is made, in 10⁹ bytes.")] = 4.0,
    path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Take this directory instead of making one.")
    ] = None,
    tensors: Annotated[int | None, typer.Option(min=12, help="How many. Default: as models of that size.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Everyone is measured so often, interleaved.")] = 7,
    device: Annotated[str, typer.Option(help="Where the tensors are to be: cpu, or cuda for the first GPU.")] = "cpu",
    only: Annotated[str, typer.Option(help="Contestants, by comma: fio, sequential, stoker, runai, …")] = "",
    pool_gb: Annotated[
        float | None, typer.Option(help="Size of Stoker's pool, to hold the checkpoint and more. Default: just that.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where files are made, and kept. Default: in STOKER_HOME, and removed.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare everyone's tensors with the files once.")] = True,
    sweep: Annotated[
        bool, typer.Option(help="Only Stoker and the device, at 1 to 8 GB and 100 to 10,000 tensors.")
    ] = False,
    together: Annotated[
        bool,
        typer.Option(
            help="One contestant right after the other, in memory the one before gave back. Default: alone, rested."
        ),
    ] = False,
    rest_s: Annotated[float, typer.Option(min=0, help="Seconds of rest before each measurement.")] = 5.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time cold loads of a checkpoint, and one from the warm pool, beside the raw device and other loaders.

    Each contestant runs in a process of its own whose imports are not timed, after the page cache was dropped; the
    time is that from the call until every tensor is usable and kept. Needs twice --gb of disk (half without torch) and a
    little more than twice of memory. fio, run:ai's streamer and fastsafetensors are left out where not installed.

    \b
    stoker bench load --gb 4 --rounds 7 --json load.json
    stoker bench load --gb 1 --rounds 3 --only fio,stoker,safetensors
    stoker bench load --path ./my-model --work /data/bench
    stoker bench load --sweep --rounds 3
    stoker bench load --device cuda

    With --device cuda every tensor ends on the first GPU: from the disk, and from the warm pool, through a ring in
    device memory; a memcpy from pinned memory shows what the way there can do.
    """
    from stoker_cli import output
    from stoker_cli.bench import load_figures, report
    from stoker_cli.bench.load_run import choose, need_device

    need_device(device)
    names, missing = choose(SWEEP_CONTESTANTS if sweep else [name for name in only.split(",") if name], device)
    for line in missing:
        typer.echo(line)
    with _work(work) as directory:
        run = partial(
            _measure,
            directory,
            names,
            rounds,
            device=device,
            pool_gb=pool_gb,
            together=together,
            verify=verify,
            rest_s=rest_s,
        )
        if sweep:
            measured = [one for case in _sweep_cases() for one in run(case)]
            found = load_figures.sweep_figures(measured)
            shown = load_figures.sweep_table(measured)
        else:
            measured = run(Case(gb=gb, tensors=tensors, path=path))
            found = load_figures.figures(measured)
            shown = load_figures.table(measured)
    output.table(shown)
    if json_file:
        report.write(json_file, figures=found, rounds=measured)


class Case(NamedTuple):
    """A checkpoint to make, or to take from `path`. removed: as soon as it was measured."""

    gb: float
    tensors: int | None = None
    path: Path | None = None
    removed: bool = False


def _sweep_cases() -> list[Case]:
    sizes = [Case(gb, removed=True) for gb in SWEEP_GB]
    return sizes + [Case(SWEEP_GB[0], tensors, removed=True) for tensors in SWEEP_TENSORS]


def _measure(
    work: Path,
    names: Sequence[str],
    rounds: int,
    case: Case,
    *,
    device: str,
    pool_gb: float | None,
    together: bool,
    verify: bool,
    rest_s: float,
) -> list[Round]:
    """Rounds with their ratios, of one checkpoint. Raises SetupFailed if disk or memory are too small."""
    from stoker_cli.bench import load_run
    from stoker_cli.bench.load_figures import with_ratios

    load_run.need_memory(_size_bytes(case), round(pool_gb * 1e9) if pool_gb else _size_bytes(case), names)
    checkpoint = _checkpoint(work, case, pickles="torch" in names)
    typer.echo(f"{checkpoint.tensors} tensors, {checkpoint.total_bytes / 1e9:.2f} GB in {len(checkpoint.files)} files")
    try:
        bench = load_run.Bench(
            checkpoint,
            names,
            device=device,
            pool_bytes=load_run.pool_bytes(checkpoint, pool_gb),
            together=together,
            logs=work,
            say=typer.echo,
            rest_s=rest_s,
        )
        measured = bench.run(rounds, verify=verify)
    finally:
        if case.removed:
            shutil.rmtree(checkpoint.directory, ignore_errors=True)
    sizes = {"checkpoint_gb": checkpoint.total_bytes / 1e9, "tensors": float(checkpoint.tensors)}
    return [sizes | with_ratios(one, checkpoint.total_bytes) for one in measured]


def _size_bytes(case: Case) -> int:
    return round(case.gb * 1e9) if case.path is None else sum(f.stat().st_size for f in case.path.glob("*.safetensors"))


def _checkpoint(work: Path, case: Case, *, pickles: bool) -> Checkpoint:
    from stoker_cli.bench import make_checkpoint

    if case.path is None:
        made = make_checkpoint.make(work, _size_bytes(case), case.tensors, pickles=pickles, progress=typer.echo)
    else:
        source = case.path.resolve()
        beside = work / f"taken-{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"
        made = make_checkpoint.take(source, beside, pickles=pickles, progress=typer.echo)
    make_checkpoint.need_direct(made.files[0])
    return made


@contextlib.contextmanager
def _work(given: Path | None) -> Iterator[Path]:
    """Where files are made: the directory given, which stays, or one of our own on the disk of STOKER_HOME."""
    from stoker_cli.settings import UpSettings
    from stoker_core.settings import load as load_settings

    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    home = load_settings(UpSettings).home
    home.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="bench-load-", dir=home))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)

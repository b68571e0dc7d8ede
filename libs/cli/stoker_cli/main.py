"""The `stoker` command. Commands are thin: options in, one call, output; what they need is imported when they run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker_cli import output
from stoker_cli.bench.app import app as bench
from stoker_cli.sim.app import app as sim
from stoker_core.errors import InvalidSettings, StokerError

app = typer.Typer(
    name="stoker",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.add_typer(sim, name="sim")

Url = Annotated[str | None, typer.Option("--url", help="Gateway to talk to. Default: the system of STOKER_HOME.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def main() -> None:
    """Entry point. Exits 1 with one line on standard error for a StokerError, 2 for wrong usage or settings."""
    try:
        app()
    except (StokerError, BaseExceptionGroup) as error:
        cause = first_cause(error)
        if not isinstance(cause, StokerError):
            raise
        output.error(cause.message)
        raise SystemExit(2 if isinstance(cause, InvalidSettings) else 1) from error


def first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Serverless serving of large language models.

    \b
    stoker up                                   a whole system on this machine
    stoker deploy ./my-model --name my-model    register a Hugging Face directory, or one in S3
    stoker prefetch my-model                    bring it to the nodes before it is asked
    stoker chat smollm2-135m "Hello!"           talk to a model; it starts when asked
    """
    from stoker_core.logging import setup_logging

    setup_logging("cli", level="warning")
    if version:
        from stoker_core import __version__

        typer.echo(f"stoker {__version__}")
        raise typer.Exit


@app.command()
def up(
    gateway_port: Annotated[int | None, typer.Option(help="HTTP port; 0: any free one. Default 8080.")] = None,
    nats_port: Annotated[int | None, typer.Option(help="Default 14222.")] = None,
    postgres_port: Annotated[int | None, typer.Option(help="Default 15432.")] = None,
    home: Annotated[Path | None, typer.Option(help="Where all state lives. Default: STOKER_HOME or ~/.stoker.")] = None,
    cpu_slots: Annotated[int | None, typer.Option(help="Instances that may run side by side on CPUs.")] = None,
    demo: Annotated[bool | None, typer.Option("--demo/--no-demo", help="Fetch and register the demo model.")] = None,
) -> None:
    """Run a whole system on this machine, in the foreground, until Ctrl-C.

    \b
    stoker up
    stoker up --gateway-port 0 --no-demo
    STOKER_HOME=/data/stoker stoker up

    Every option is a setting too: --gateway-port is STOKER_UP_GATEWAY_PORT.
    """
    from stoker_cli.settings import UpSettings
    from stoker_cli.up import up as run
    from stoker_core.settings import load

    options = {
        "STOKER_UP_GATEWAY_PORT": gateway_port,
        "STOKER_UP_NATS_PORT": nats_port,
        "STOKER_UP_POSTGRES_PORT": postgres_port,
        "STOKER_HOME": home,
        "STOKER_UP_CPU_SLOTS": cpu_slots,
        "STOKER_UP_DEMO": None if demo is None else str(demo).lower(),
    }
    given = {key: str(value) for key, value in options.items() if value is not None}
    settings = load(UpSettings, {**os.environ, **given})
    asyncio.run(run(settings, lambda line: print(line, flush=True)))


@app.command()
def deploy(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face directory with safetensors: a path, or s3://bucket/prefix.")
    ],
    name: Annotated[str | None, typer.Option(help="What requests call it. Default: the last part of its path.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens. Default: the model's own.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests in one batch. Default 8.")] = None,
    keep_alive: Annotated[float | None, typer.Option(help="Seconds of idleness before it stops. Default 60.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, or sim (no model: tests only).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    kv_cache_mib: Annotated[
        int | None, typer.Option(help="KV cache in MiB. Default: what slots and context need.")
    ] = None,
    wait_s: Annotated[float | None, typer.Option(help="How long a request waits for an instance. Default 60.")] = None,
    queue_max: Annotated[int | None, typer.Option(help="Waiting requests per gateway. Default 64.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Register a model. It starts at its first request.

    \b
    stoker deploy ./SmolLM2-360M-Instruct --name smollm2-360m
    stoker deploy /models/qwen3 --max-model-len 4096 --keep-alive 300
    stoker deploy s3://models/qwen3-8b --name qwen3

    Credentials of S3 are the storage agents' own: they read it, not this command.
    """
    from stoker_cli import render
    from stoker_cli.answers import Deployed
    from stoker_cli.client import parse
    from stoker_cli.source import default_name, source_url

    url_of_source = source_url(source)
    chosen = {
        "max_model_len": max_model_len,
        "slots": slots,
        "keep_alive_s": keep_alive,
        "engine": engine,
        "dtype": dtype,
        "kv_cache_bytes": None if kv_cache_mib is None else kv_cache_mib * 2**20,
        "wait_s": wait_s,
        "queue_max": queue_max,
    }
    options = {key: value for key, value in chosen.items() if value is not None}
    body = {"name": name or default_name(url_of_source), "source": url_of_source, "options": options}
    answer = _call(url, "POST", "/admin/v1/models", body, timeout_s=600.0)
    if as_json:
        output.as_json(answer)
    else:
        typer.echo(render.deployed(parse(answer, Deployed)))


@app.command()
def models(
    tiers: Annotated[bool, typer.Option(help="Show in which tiers of which nodes they lie.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List the registered models; with --tiers how much of each lies where, also while it arrives.

    \b
    stoker models
    stoker models --tiers
    stoker models --json | jq -r '.models[].name'
    """
    from stoker_cli import answers, render

    table = render.tiers_table if tiers else render.models_table
    _list(url, "/admin/v1/models", as_json, answers.Models, lambda found: table(found.models))


@app.command()
def prefetch(
    model: Annotated[str, typer.Argument(help="A registered model.")],
    nodes: Annotated[list[str] | None, typer.Argument(help="Where to. Default: all nodes that are live.")] = None,
    tier: Annotated[str, typer.Option(help="dram (the pool of memory, and the SSD beside), or ssd alone.")] = "dram",
    priority: Annotated[int, typer.Option(help="Higher goes first; starts go before all.")] = 0,
    within: Annotated[float | None, typer.Option(help="Seconds after which it need not begin any more.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Give up instead what was wanted before.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Bring a model to nodes before anybody asks for it. Returns once it is ordered; the nodes work in the background.

    \b
    stoker prefetch qwen3
    stoker prefetch qwen3 node-a node-b --tier ssd --priority 5
    stoker prefetch qwen3 --cancel
    stoker models --tiers                        how far it is
    stoker events --filter 'tier.prefetch.*'     as it goes
    """
    from urllib.parse import quote, urlencode

    from stoker_cli import render
    from stoker_cli.answers import Prefetched
    from stoker_cli.client import parse

    path = f"/admin/v1/models/{quote(model, safe='')}/prefetch"
    if cancel:
        chosen = urlencode([("node", node) for node in nodes or ()])
        answer = _call(url, "DELETE", f"{path}?{chosen}" if chosen else path)
    else:
        body = {"nodes": nodes or [], "tier": tier, "priority": priority}
        limit = {} if within is None else {"budget_ms": round(within * 1000)}
        answer = _call(url, "POST", path, {**body, **limit})
    if as_json:
        output.as_json(answer)
    else:
        typer.echo(render.prefetched(parse(answer, Prefetched)))


@app.command()
def ps(url: Url = None, as_json: Json = False) -> None:
    """List the instances: what runs where, how busy it is, where its weights came from, and where its start went.

    \b
    stoker ps
    watch stoker ps
    """
    from stoker_cli import answers, render

    _list(url, "/admin/v1/instances", as_json, answers.Instances, lambda found: render.instances_table(found.instances))


@app.command()
def nodes(url: Url = None, as_json: Json = False) -> None:
    """List the nodes with their devices, tiers, and links to the peers that they read from.

    \b
    stoker nodes
    """
    from stoker_cli import answers, render

    _list(url, "/admin/v1/nodes", as_json, answers.Nodes, lambda found: render.nodes_table(found.nodes))


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="The node.")],
    undo: Annotated[bool, typer.Option("--undo", help="Use it again instead.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Return once nothing is left there, or at once.")
    ] = True,
    url: Url = None,
) -> None:
    """Empty a node: nothing new starts there, and what runs ends with its requests. It lasts until it is undone.

    \b
    stoker drain node-a
    stoker drain node-a --no-wait
    stoker drain node-a --undo
    """
    from stoker_cli import drain as draining
    from stoker_cli.client import connect

    async def call() -> None:
        async with connect(_gateway_url(url)) as gateway:
            if undo:
                await draining.undo(gateway, node)
                typer.echo(f"{node} may be used again")
            else:
                await draining.drain(gateway, node, wait=wait, say=lambda line: print(line, flush=True))

    with suppress(KeyboardInterrupt):  # it goes on being drained
        asyncio.run(call())


@app.command()
def why(
    name: Annotated[str, typer.Argument(metavar="MODEL|INSTANCE", help="A model's name, or an instance's id.")],
    last: Annotated[int, typer.Option(help="How many decisions of a model, the newest first.", min=1, max=200)] = 3,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say why a model was placed where it was: the ways there were, what was predicted of each, and what happened.

    \b
    stoker why smollm2-135m
    stoker why i-1m7xxbwamdxsxkapd90jb
    stoker why smollm2-135m --json | jq '.decisions[0].error'
    """
    from stoker_cli import why as explaining
    from stoker_cli.answers import Decisions
    from stoker_cli.client import connect, parse

    async def call() -> Any:
        async with connect(_gateway_url(url)) as gateway:
            return await explaining.decisions(gateway, name, last)

    answer = asyncio.run(call())
    if as_json:
        output.as_json(answer)
    else:
        explaining.show(parse(answer, Decisions))


@app.command()
def rm(name: Annotated[str, typer.Argument(help="The model.")], url: Url = None) -> None:
    """Delete a model: its registration and what nodes keep of it. The directory it came from stays.

    \b
    stoker rm my-model
    """
    from urllib.parse import quote

    _call(url, "DELETE", f"/admin/v1/models/{quote(name, safe='')}")
    typer.echo(f"{name} deleted")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A registered model.")],
    prompt: Annotated[str | None, typer.Argument(help="What to say. Without it: a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default 1.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Limit of one answer.", min=1)] = 1024,
    seed: Annotated[int | None, typer.Option(help="The same seed repeats an answer.")] = None,
    url: Url = None,
) -> None:
    """Talk to a model; its answer is streamed. Timing goes to standard error.

    \b
    stoker chat smollm2-135m
    stoker chat smollm2-135m "Name the capital of France." --temperature 0
    """
    from stoker_cli import chat as chatting

    options = chatting.Options(model=model, temperature=temperature, max_tokens=max_tokens, seed=seed)
    chatting.run(_gateway_url(url), options, prompt, system)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for more, or end.")] = True,
    since: Annotated[str | None, typer.Option(help="Sequence number to replay from, or 'all'.")] = None,
    wanted: Annotated[str, typer.Option("--filter", help="'instance', 'instance.*', '*.failed' …")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One CloudEvent a line, with its sequence as 'seq'.")] = False,
) -> None:
    """Show what happens: models, nodes, instances, tiers. Live, or replayed from what is kept.

    \b
    stoker events
    stoker events --since all --filter 'instance.*'
    stoker events --no-follow --json | jq .type
    """
    from stoker_cli import events as stream

    with suppress(KeyboardInterrupt):
        asyncio.run(stream.show(_home_endpoints().nats_url, wanted=wanted, since=since, follow=follow, as_json=as_json))


@app.command()
def doctor(url: Url = None, as_json: Json = False) -> None:
    """Say what is installed, which settings are in force, what runs. Exits 1 if something is wrong.

    \b
    stoker doctor
    stoker doctor --json | jq .problems
    """
    from stoker_cli import doctor as examination

    report = asyncio.run(examination.examine(os.environ, url))
    if as_json:
        import msgspec

        output.as_json(msgspec.to_builtins(report))
    else:
        from rich.console import Console

        examination.show(report, Console(highlight=False, soft_wrap=True))
    if report.problems:
        raise typer.Exit(1)


def _list(url: str | None, path: str, as_json: bool, kind: type[Any], table: Callable[[Any], Any]) -> None:
    """Print an admin list, as it came or as a table."""
    from stoker_cli.client import parse

    answer = _call(url, "GET", path)
    if as_json:
        output.as_json(answer)
    else:
        output.table(table(parse(answer, kind)))


def _call(
    url: str | None, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 30.0
) -> Any:
    from stoker_cli.client import connect

    async def call() -> Any:
        async with connect(_gateway_url(url), timeout_s=timeout_s) as gateway:
            return await gateway.json(method, path, body)

    return asyncio.run(call())


def _gateway_url(url: str | None) -> str:
    return url or _home_endpoints().gateway_url


def _home_endpoints() -> Any:
    from stoker_cli.home import running_endpoints
    from stoker_cli.settings import UpSettings
    from stoker_core.settings import load

    return running_endpoints(load(UpSettings).home)

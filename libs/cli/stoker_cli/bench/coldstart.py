"""`stoker bench coldstart`: from HTTP request to first token, for a model that is not running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

MODEL = "coldstart"
KEEP_ALIVE_S = 1.0
READY_TIMEOUT_S = 300.0
START_TIMEOUT_S = 300.0
POLL_S = 0.1
PHASES = ("phase_queue_s", "phase_place_s", "phase_load_s", "phase_engine_s", "phase_prefill_s")


def coldstart(
    rounds: Annotated[int, typer.Option(min=1, help="Cold starts of each kind, interleaved.")] = 5,
    model: Annotated[Path | None, typer.Option(help="A Hugging Face directory. Default: the demo model.")] = None,
    api_server: Annotated[bool, typer.Option(help="Time vLLM's own api_server in the same rounds.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time cold starts, beside vLLM's own `api_server --enforce-eager` in the same rounds.

    Runs a system of its own in a temporary home. The very first start of a model also copies its files into the
    node's SSD tier; it is shown apart and counts in no median.

    \b
    stoker bench coldstart
    stoker bench coldstart --rounds 7 --json coldstart.json
    stoker bench coldstart --no-api-server --model ./my-model
    """
    asyncio.run(_bench(rounds, model, api_server, json_file))


async def _bench(rounds: int, model: Path | None, with_api_server: bool, json_file: Path | None) -> None:
    from stoker_cli import demo
    from stoker_cli.answers import Deployed
    from stoker_cli.bench import report
    from stoker_cli.bench.api_server import first_token_s
    from stoker_cli.client import parse
    from stoker_cli.settings import UpSettings
    from stoker_core.clock import SystemClock
    from stoker_core.settings import load

    settings = load(UpSettings)
    cache = settings.demo_cache or settings.home / "cache"
    directory = (model or await demo.ensure_demo(cache, typer.echo, SystemClock())).absolute()
    measured: list[dict[str, float]] = []
    work = Path(tempfile.mkdtemp(prefix="stoker-"))
    try:
        async with _system(work) as gateway:
            body = {"name": MODEL, "source": directory.as_uri(), "options": {"keep_alive_s": KEEP_ALIVE_S}}
            spec = parse(await gateway.json("POST", "/admin/v1/models", body), Deployed).model
            await _prepared(gateway, spec.architecture)
            first = await _stoker_round(gateway, work)
            typer.echo(f"first start, files copied into the SSD tier: {first['ttft_s']:.2f} s")
            for number in range(1, rounds + 1):
                one = await _stoker_round(gateway, work)
                if with_api_server:
                    one["api_server_ttft_s"] = await first_token_s(
                        directory,
                        model=MODEL,
                        body=_request(),
                        port=_free_port(),
                        kv_cache_bytes=spec.kv_cache_bytes,
                        max_model_len=spec.max_model_len,
                        work=work,
                        timeout_s=START_TIMEOUT_S,
                    )
                    one["ratio"] = one["ttft_s"] / one["api_server_ttft_s"]
                measured.append(one)
                typer.echo(f"round {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in one.items()))
    finally:
        shutil.rmtree(work, ignore_errors=True)

    figures = report.medians(measured, ["ttft_s", "api_server_ttft_s", "ratio", *PHASES])
    figures["first_ttft_s"] = round(first["ttft_s"], 4)
    figures["ttft_s_max"] = round(max(r["ttft_s"] for r in measured), 4)
    typer.echo("medians: " + ", ".join(f"{k} {v:g}" for k, v in figures.items()))
    gap = median(abs(r["ttft_s"] - sum(r[p] for p in PHASES)) for r in measured)
    typer.echo(f"phases add up to the first token's time within {gap * 1e3:.1f} ms")
    if json_file:
        report.write(json_file, figures=figures, rounds=measured)


def _request() -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Name the capital of France."}],
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
    }


async def _stoker_round(gateway: Any, work: Path) -> dict[str, float]:
    """One cold start, then wait until the instance has stopped again. Seconds, by phase of the critical path."""
    from stoker_cli.answers import Instances
    from stoker_cli.bench.api_server import first_content
    from stoker_core.errors import SetupFailed

    began_s = time.monotonic()
    async with gateway.open("POST", "/v1/chat/completions", _request()) as response:
        if not await first_content(response):
            raise SetupFailed("the stream ended without a token")
        ttft_s = time.monotonic() - began_s
        timing = _server_timing(response.headers.get("Server-Timing", ""))
        await response.read()
    listed = (await gateway.get("/admin/v1/instances", Instances)).instances
    instance = next(i for i in listed if i.model == MODEL and i.state == "ready")
    place_s = await _place_s(work, instance.instance_id)
    phases = instance.phases
    load_s = (phases.lease_ms + phases.load_ms) / 1e3
    engine_s = (phases.fork_ms + phases.engine_ms + phases.announce_ms) / 1e3
    await _stopped(gateway, instance.instance_id)
    return {
        "ttft_s": ttft_s,
        # What the gateway spent before and around the start: parsing, tokenising, messages on their way.
        "phase_queue_s": timing["prepare"] + timing["wait"] - place_s - load_s - engine_s,
        "phase_place_s": place_s,
        "phase_load_s": load_s,
        "phase_engine_s": engine_s,
        "phase_prefill_s": ttft_s - timing["prepare"] - timing["wait"],
    }


def _server_timing(header: str) -> dict[str, float]:
    """`prepare;dur=1.5, wait;dur=900` → seconds by name. Source: W3C Server Timing."""
    return {name: float(ms) / 1e3 for name, ms in re.findall(r"(\w+);dur=([0-9.]+)", header)}


async def _place_s(work: Path, instance_id: str) -> float:
    """The scheduler's part, as its event instance.placed says."""
    from stoker_bus.nats import NatsBus
    from stoker_cli.home import running_endpoints
    from stoker_contracts import subjects
    from stoker_contracts.codec import decode
    from stoker_contracts.events import INSTANCE_PLACED, CloudEvent
    from stoker_core.errors import SetupFailed

    bus = await NatsBus.connect(running_endpoints(work / "home").nats_url, name="bench")
    try:
        placed = bus.follow(subjects.event(*INSTANCE_PLACED), since_sequence=1, follow=False)
        async for message in placed:
            event = decode(CloudEvent, message.data)
            if event.subject == instance_id:
                return float(event.data["place_ms"]) / 1e3
    finally:
        await bus.close()
    raise SetupFailed(f"no event says how {instance_id} was placed")


async def _until(check: Callable[[], Awaitable[bool]], *, what: str) -> None:
    """Ask again until `check` holds. Raises SetupFailed after READY_TIMEOUT_S."""
    from stoker_core.errors import SetupFailed

    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                if await check():
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise SetupFailed(f"{what}: not within {READY_TIMEOUT_S:g} s") from error


async def _prepared(gateway: Any, architecture: str) -> None:
    """Wait until a node has paid the first start of this architecture."""
    from stoker_cli.answers import Nodes

    async def check() -> bool:
        return any(architecture in n.prepared for n in (await gateway.get("/admin/v1/nodes", Nodes)).nodes)

    await _until(check, what=f"a node prepared for {architecture}")


async def _stopped(gateway: Any, instance_id: str) -> None:
    from stoker_cli.answers import Instances

    async def check() -> bool:
        listed = (await gateway.get("/admin/v1/instances", Instances)).instances
        return not any(i.instance_id == instance_id and i.state in ("starting", "ready", "stopping") for i in listed)

    await _until(check, what=f"{instance_id} stopped after its keep-alive")


@contextlib.asynccontextmanager
async def _system(work: Path) -> AsyncIterator[Any]:
    """A system of its own on free ports; a gateway client while it runs."""
    from stoker_cli.answers import Nodes
    from stoker_cli.client import connect
    from stoker_cli.home import read_endpoints, running_endpoints
    from stoker_cli.process import spawn, tail
    from stoker_core.errors import ApiFailed, NotRunning, SetupFailed

    home, log = work / "home", work / "up.log"
    ports = ("--gateway-port", "0", "--nats-port", "0", "--postgres-port", "0")
    command = (sys.executable, "-m", "stoker_cli", "up", "--home", str(home), "--no-demo", *ports)
    with log.open("wb") as output:
        child = spawn(command, env=os.environ, output=output)

    async def listens() -> bool:
        if not child.running:
            raise SetupFailed(f"the system does not start: {'; '.join(tail(log))}")
        return read_endpoints(home) is not None

    try:
        await _until(listens, what="a running system")
        async with connect(running_endpoints(home).gateway_url, timeout_s=START_TIMEOUT_S) as gateway:

            async def can_start() -> bool:
                if not child.running:
                    raise SetupFailed(f"the system ended: {'; '.join(tail(log))}")
                try:
                    return any(n.zygote_ready for n in (await gateway.get("/admin/v1/nodes", Nodes)).nodes)
                except (ApiFailed, NotRunning):
                    return False

            await _until(can_start, what="a node that can start instances")
            yield gateway
    finally:
        await child.stop(signal.SIGTERM, 60.0)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

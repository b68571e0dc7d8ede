"""`stoker up`: a whole system on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from stoker_cli import demo, home, system
from stoker_cli.answers import Deployed, Nodes
from stoker_cli.client import Gateway, connect, parse
from stoker_cli.embedded.postgres import EmbeddedPostgres
from stoker_cli.ports import HOST, choose
from stoker_cli.settings import UpSettings
from stoker_cli.supervisor import Supervisor
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import ApiFailed, NotRunning, SetupFailed

POLL_S = 0.2
PROGRESS_INTERVAL_S = 5.0
REGISTER_TRY_S = 1.0
OLD_SERVERS_PATIENCE_S = 10.0
SAME_SIGNAL_S = 0.5

Report = Callable[[str], None]


async def up(settings: UpSettings, report: Report) -> None:
    """Run the system until SIGINT or SIGTERM, then stop it in order; a second signal kills it at once.

    report: gets lines for the person who watches.
    Raises AlreadyRunning, PortTaken, InvalidSettings or SetupFailed, the last ones in an ExceptionGroup; nothing is left running then.
    """
    clock = SystemClock()
    home.prepare(settings.home, settings.node)
    with home.only_one(settings.home):
        secrets = home.load_secrets(settings.home)
        gateway_port, nats_port, postgres_port = await _ports(settings, clock)
        nats, postgres = system.servers(settings, secrets, nats_port, postgres_port)
        endpoints = home.Endpoints(
            gateway_url=f"http://{HOST}:{gateway_port}", nats_url=nats.url, postgres_url=postgres.url, pid=os.getpid()
        )
        report(f"starting in {settings.home} (logs in {settings.home / 'logs'})")
        nats.prepare()
        await _prepare(postgres, settings, clock)
        home.write_endpoints(settings.home, endpoints)
        env = system.service_env(settings, endpoints, secrets, os.environ)
        supervisor = Supervisor(
            system.plan(settings, nats, postgres, env, os.environ),
            logs=settings.home / "logs",
            clock=clock,
            report=report,
        )
        await _run(supervisor, _Welcome(settings, endpoints, supervisor, clock, report), clock, report)
        home.endpoints_path(settings.home).unlink(missing_ok=True)


def _patience_s(settings: UpSettings) -> float:
    """How long servers of a run that was killed may take to let go of their ports and files."""
    return OLD_SERVERS_PATIENCE_S if home.read_endpoints(settings.home) else 0.0


async def _prepare(postgres: EmbeddedPostgres, settings: UpSettings, clock: Clock) -> None:
    until_s = clock.monotonic_s() + _patience_s(settings)
    while True:
        try:
            return postgres.prepare()
        except SetupFailed:
            if clock.monotonic_s() >= until_s:
                raise
        await clock.sleep(POLL_S)


async def _ports(settings: UpSettings, clock: Clock) -> list[int]:
    patience_s = _patience_s(settings)
    wanted = (
        (settings.gateway_port, "the gateway", "--gateway-port or STOKER_UP_GATEWAY_PORT"),
        (settings.nats_port, "NATS", "--nats-port or STOKER_UP_NATS_PORT"),
        (settings.postgres_port, "PostgreSQL", "--postgres-port or STOKER_UP_POSTGRES_PORT"),
    )
    return [
        await choose(port, what=what, setting=setting, clock=clock, patience_s=patience_s)
        for port, what, setting in wanted
    ]


async def _run(supervisor: Supervisor, welcome: _Welcome, clock: Clock, report: Report) -> None:
    stop, kill = asyncio.Event(), asyncio.Event()
    first_s: list[float] = []

    def on_signal() -> None:
        now_s = clock.monotonic_s()
        if not first_s:
            first_s.append(now_s)
            report("stopping; once more kills at once")
            stop.set()
        elif now_s - first_s[0] > SAME_SIGNAL_S:  # `make` passes on what the terminal sent us already
            kill.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(supervisor.run(stop, kill), name="supervisor")
        welcoming = group.create_task(welcome.run(), name="welcome")
        await stop.wait()
        welcoming.cancel()
        await running
    report("stopped")


class _Welcome:
    """From started processes to the ready line: gateway, node, demo model."""

    def __init__(
        self, settings: UpSettings, endpoints: home.Endpoints, supervisor: Supervisor, clock: Clock, report: Report
    ) -> None:
        self._settings = settings
        self._url = endpoints.gateway_url
        self._supervisor = supervisor
        self._clock = clock
        self._report = report

    async def run(self) -> None:
        cache = self._settings.demo_cache or self._settings.home / "cache"
        async with asyncio.TaskGroup() as group:
            node = group.create_task(self._node_ready())
            model = (
                group.create_task(demo.ensure_demo(cache, self._report, self._clock)) if self._settings.demo else None
            )
            await node
        if model:
            await self._register(model.result())
        self._supervisor.establish()
        self._report(self._ready_lines())

    async def _node_ready(self) -> None:
        """Return once a node can start instances. Raises SetupFailed after the time that settings give."""
        await self._supervisor.wait_ready("nats", "postgres")
        self._report("NATS and PostgreSQL are ready; starting the four services")
        began_s = said_s = self._clock.monotonic_s()
        limit_s = self._settings.ready_timeout_s
        async with connect(self._url) as gateway:
            while missing := await _missing(gateway):
                now_s = self._clock.monotonic_s()
                if now_s - began_s > limit_s:
                    logs = self._settings.home / "logs"
                    raise SetupFailed(f"still waiting for {missing} after {limit_s:g} s; see {logs}")
                if now_s - said_s >= PROGRESS_INTERVAL_S:
                    self._report(f"waiting for {missing} … {now_s - began_s:.0f} s")
                    said_s = now_s
                await self._clock.sleep(POLL_S)

    async def _register(self, directory: Path) -> None:
        """Register the demo model; the same one again changes nothing."""
        until_s = self._clock.monotonic_s() + self._settings.ready_timeout_s
        body = {"name": demo.NAME, "source": directory.as_uri(), "options": {}}
        async with connect(self._url, timeout_s=120.0) as gateway:
            while True:
                try:
                    answer = parse(await gateway.json("POST", "/admin/v1/models", body), Deployed)
                    break
                except (ApiFailed, NotRunning) as error:
                    refused = isinstance(error, ApiFailed) and error.status < 500
                    if refused or self._clock.monotonic_s() > until_s:
                        raise SetupFailed(f"the demo model cannot be registered: {error.message}") from error
                await self._clock.sleep(REGISTER_TRY_S)
        if answer.created:
            self._report(f"registered {demo.NAME}")

    def _ready_lines(self) -> str:
        lines = [f"Stoker is ready at {self._url}", ""]
        if self._settings.demo:
            body = {
                "model": demo.NAME,
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
            }
            lines += [
                f"  curl {self._url}/v1/chat/completions -H 'Content-Type: application/json' \\",
                f"    -d {shlex.quote(msgspec.json.encode(body).decode())}",
                f"  stoker chat {demo.NAME}",
            ]
        else:
            lines.append("  stoker deploy DIRECTORY --name NAME")
        return "\n".join([*lines, "  stoker events        # what happens, as it happens", "", "Ctrl-C stops it."])


async def _missing(gateway: Gateway) -> str:
    """What the system still waits for; '' once a node can start instances."""
    if await gateway.status("/readyz") != 200:
        return "the gateway"
    try:
        nodes = await gateway.get("/admin/v1/nodes", Nodes)
    except (ApiFailed, NotRunning):
        return "the gateway"
    if not nodes.nodes:
        return "a node to report"
    if not any(node.tiers for node in nodes.nodes):
        return "the storage agent"
    return "" if any(node.zygote_ready for node in nodes.nodes) else "the worker to import its engine"

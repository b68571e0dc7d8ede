"""`stoker up`: a whole system on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from stoker_cli import home, system
from stoker_cli.embedded.postgres import EmbeddedPostgres
from stoker_cli.ports import HOST, choose
from stoker_cli.settings import UpSettings
from stoker_cli.supervisor import Supervisor
from stoker_cli.welcome import Report, Welcome
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import SetupFailed

POLL_S = 0.2
OLD_SERVERS_PATIENCE_S = 10.0
SAME_SIGNAL_S = 0.5


async def up(settings: UpSettings, report: Report) -> None:
    """Run the system until SIGINT or SIGTERM, then stop it in order; a second signal kills it at once.

    report: gets lines for the person who watches.
    Raises AlreadyRunning, PortTaken, InvalidSettings or SetupFailed, the last ones in an ExceptionGroup; nothing is left running then.
    """
    clock, report = SystemClock(), if_anybody_reads(report)
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
        try:
            await _run(supervisor, Welcome(settings, endpoints, supervisor, clock, report), clock, report)
        finally:
            home.endpoints_path(settings.home).unlink(missing_ok=True)


def if_anybody_reads(report: Report) -> Report:
    """`report`, for a system that outlives its audience: a closed terminal or pipe must not keep it from stopping."""

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            report(line)

    return say


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


async def _run(supervisor: Supervisor, welcome: Welcome, clock: Clock, report: Report) -> None:
    stop, kill = asyncio.Event(), asyncio.Event()
    first_s: list[float] = []

    def on_signal() -> None:
        now_s = clock.monotonic_s()
        if not first_s:
            first_s.append(now_s)
            stop.set()
            report("stopping; once more kills at once")
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

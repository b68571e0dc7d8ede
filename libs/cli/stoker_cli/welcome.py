"""From started processes to the ready line: gateway, node, demo model."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from stoker_cli import demo
from stoker_cli.answers import Deployed, Nodes
from stoker_cli.client import Gateway, connect, parse
from stoker_cli.home import Endpoints
from stoker_cli.settings import UpSettings
from stoker_cli.supervisor import Supervisor
from stoker_core.clock import Clock
from stoker_core.errors import ApiFailed, NotRunning, SetupFailed

POLL_S = 0.2
PROGRESS_INTERVAL_S = 5.0
REGISTER_TRY_S = 1.0
REGISTER_TIMEOUT_S = 120.0

Report = Callable[[str], None]


class Welcome:
    """Waits until the system can answer, gets the demo model in, and says so."""

    def __init__(
        self, settings: UpSettings, endpoints: Endpoints, supervisor: Supervisor, clock: Clock, report: Report
    ) -> None:
        self._settings = settings
        self._url = endpoints.gateway_url
        self._supervisor = supervisor
        self._clock = clock
        self._report = report

    async def run(self) -> None:
        """Raises SetupFailed if the system, or its demo model, is not ready in the time that settings give."""
        cache = self._settings.demo_cache or self._settings.home / "cache"
        async with asyncio.TaskGroup() as group:
            model = None
            if self._settings.demo:
                model = group.create_task(demo.ensure_demo(cache, self._report, self._clock))
            await self._supervisor.wait_ready("nats", "postgres")
            self._report("NATS and PostgreSQL are ready; starting the four services")
            await self._until(missing_node)
        if model:
            await self._register(model.result())
        self._supervisor.establish()
        self._report(ready_lines(self._url, with_demo=model is not None))

    async def _until(self, missing: Callable[[Gateway], Awaitable[str]]) -> None:
        """Poll until nothing is missing, saying now and then what is."""
        began_s = said_s = self._clock.monotonic_s()
        limit_s = self._settings.ready_timeout_s
        async with connect(self._url) as gateway:
            while what := await missing(gateway):
                now_s = self._clock.monotonic_s()
                if now_s - began_s > limit_s:
                    logs = self._settings.home / "logs"
                    raise SetupFailed(f"still waiting for {what} after {limit_s:g} s; see {logs}")
                if now_s - said_s >= PROGRESS_INTERVAL_S:
                    self._report(f"waiting for {what} … {now_s - began_s:.0f} s")
                    said_s = now_s
                await self._clock.sleep(POLL_S)

    async def _register(self, directory: Path) -> None:
        """Register the demo model, unless it is, and wait until its first start is prepared."""
        until_s = self._clock.monotonic_s() + self._settings.ready_timeout_s
        body = {"name": demo.NAME, "source": directory.as_uri(), "options": {}}
        async with connect(self._url, timeout_s=REGISTER_TIMEOUT_S) as gateway:
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
            self._report(f"registered {demo.NAME}; preparing its first start")

        async def missing_preparation(gateway: Gateway) -> str:
            nodes = await nodes_of(gateway)
            prepared = any(answer.model.architecture in node.prepared for node in nodes.nodes)
            return "" if prepared else "the engine to learn the model's architecture (once)"

        await self._until(missing_preparation)


async def nodes_of(gateway: Gateway) -> Nodes:
    """The nodes; none while the gateway cannot say."""
    try:
        return await gateway.get("/admin/v1/nodes", Nodes)
    except (ApiFailed, NotRunning):
        return Nodes(nodes=[])


async def missing_node(gateway: Gateway) -> str:
    """What the system still waits for; '' once a node can store models and start instances."""
    if await gateway.status("/readyz") != 200:
        return "the gateway"
    nodes = (await nodes_of(gateway)).nodes
    if not nodes:
        return "a node to report"
    if not any(node.tiers for node in nodes):
        return "the storage agent"
    return "" if any(node.zygote_ready for node in nodes) else "the worker to import its engine"


def ready_lines(url: str, *, with_demo: bool) -> str:
    """What to print when all is ready: the URL and what to try."""
    lines = [f"Stoker is ready at {url}", ""]
    if with_demo:
        question = [{"role": "user", "content": "Name the capital of France."}]
        body = msgspec.json.encode({"model": demo.NAME, "messages": question, "temperature": 0}).decode()
        lines += [
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"    -d {shlex.quote(body)}",
            f"  stoker chat {demo.NAME}",
        ]
    else:
        lines.append("  stoker deploy DIRECTORY --name NAME")
    return "\n".join([*lines, "  stoker events        # what happens, as it happens", "", "Ctrl-C stops it."])

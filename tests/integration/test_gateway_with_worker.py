"""Real gateway processes, a real worker and its instance (sim engine), on real NATS and Postgres.

Every answer is compared with what the sim engine must say: its next token depends on all before it, so that a
token lost, doubled or out of order changes the rest of the text.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from tests.support.fake_instance import VOCAB_SIZE, model_spec
from tests.support.fake_store import fake_store
from tests.support.gateway_rig import tokenizer_files
from tests.support.nats_server import NatsServer
from tests.support.services import ServiceProcess, eventually, running
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_tokenizer import END_ID, build_tokenizer

from stoker_bus.nats import NatsBus
from stoker_bus.port import Message, ask
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import CommandReply, Done, InstanceStatus, StartInstance, WorkerStatus
from stoker_contracts.inference import GATEWAY_LEASE_S
from stoker_contracts.models import EngineKind, InstanceState, ModelSpec
from stoker_db.pg import PgDatabase
from stoker_worker.engines.sim import mix, sequence_state

NODE = "node-a"
SLOTS = 4
TOKENIZER = build_tokenizer(VOCAB_SIZE)
SPEC = model_spec(engine=EngineKind.SIM, slots=SLOTS, max_model_len=2048, queue_max=64, wait_s=30.0)


def answer_of(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = True) -> tuple[str, str, int]:
    """Text, finish reason and completion tokens that the sim engine must give."""
    state, tokens = sequence_state(prompt), list[int]()
    while len(tokens) < max_tokens:
        tokens.append((state >> 33) % VOCAB_SIZE)
        state = mix(state, tokens[-1])
        if tokens[-1] == END_ID and not ignore_eos:
            return TOKENIZER.decode(tokens, skip_special_tokens=True), "stop", len(tokens)
    return TOKENIZER.decode(tokens, skip_special_tokens=True), "length", len(tokens)


@dataclass
class System:
    """A worker with one ready instance, and clients of one or two gateways."""

    bus: NatsBus
    gateways: list[ServiceProcess]
    clients: list[aiohttp.ClientSession]
    statuses: list[WorkerStatus] = field(default_factory=list)

    async def heard(self, message: Message) -> None:
        self.statuses.append(decode(WorkerStatus, message.data))

    @property
    def instance(self) -> InstanceStatus:
        return self.statuses[-1].instances[0]

    async def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        stream: bool = True,
        ignore_eos: bool = True,
        gateway: int = 0,
        events: list[bytes] | None = None,
    ) -> tuple[str, str, int]:
        """As `answer_of`, from a gateway. events: where a stream's are put as they come."""
        body = {
            "model": SPEC.name,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": ignore_eos,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        async with self.clients[gateway].post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if not stream:
                whole = await response.json()
                choice = whole["choices"][0]
                return choice["text"], choice["finish_reason"], whole["usage"]["completion_tokens"]
            events = [] if events is None else events
            async for line in response.content:
                if line.startswith(b"data: "):
                    events.append(line[6:].strip())
        assert events[-1] == b"[DONE]", events[-1]
        chunks = [json.loads(event) for event in events[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
        return text, chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]["completion_tokens"]

    async def exact(self, prompt: Sequence[int], max_tokens: int, *, gateway: int = 0) -> None:
        assert await self.ask(prompt, max_tokens, gateway=gateway) == answer_of(prompt, max_tokens)

    async def running(self, count: int) -> None:
        await eventually(lambda: self.instance.running == count, what=lambda: f"{count} running; {self.instance}")


@asynccontextmanager
async def started(
    nats_url: str, postgres_url: str, directory: Path, *, gateways: int = 1, step_s: float = 0.005
) -> AsyncIterator[System]:
    weights = write_tiny_model(directory / "model", tokenizer=False)
    shared = {"STOKER_NODE": NODE, "STOKER_NATS_URL": nats_url, "STOKER_POSTGRES_URL": postgres_url}
    home = directory / "worker"
    worker = shared | {
        "STOKER_HOME": str(home),
        "STOKER_WORKER_DEVICES": "cpu",
        "STOKER_WORKER_ENGINES": "sim",
        "STOKER_WORKER_SLOT_MEMORY_BYTES": str(1 << 30),
        "STOKER_WORKER_SIM_STEP_S": str(step_s),
        "STOKER_WORKER_INSTANCE_DRAIN_S": "1",
    }
    async with AsyncExitStack() as stack:
        database = await PgDatabase.connect(postgres_url)
        stack.push_async_callback(database.close)
        await database.models.add(SPEC, tokenizer_files())
        bus = await NatsBus.connect(nats_url, name="test")
        stack.push_async_callback(bus.close)
        await stack.enter_async_context(fake_store(home / "nodes" / NODE / "store.sock", weights))
        stack.enter_context(running("stoker_worker", worker, directory / "worker.log"))
        system = System(bus, [], [])
        for number in range(gateways):
            port = free_port()
            environment = shared | {
                "STOKER_HOME": str(directory / f"gateway-{number}"),
                "STOKER_GATEWAY_PORT": str(port),
                "STOKER_DRAIN_S": "1",
            }
            log = directory / f"gateway-{number}.log"
            system.gateways.append(stack.enter_context(running("stoker_gateway", environment, log)))
            timeout = aiohttp.ClientTimeout(total=60)
            client = aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout)
            system.clients.append(await stack.enter_async_context(client))
        await bus.subscribe(subjects.status_worker(NODE), system.heard)
        await eventually(lambda: bool(system.statuses) and system.statuses[-1].zygote_ready, what="zygote")
        await start_instance(bus, system.statuses[-1].boot_id, SPEC)
        await eventually(
            lambda: bool(system.statuses[-1].instances) and system.instance.state is InstanceState.READY, what="ready"
        )
        for number in range(gateways):
            await eventually(lambda number=number: is_ready(system.clients[number]), what="gateway ready")
            await system.exact([5], 3, gateway=number)  # the tokenizer is built
        yield system


async def start_instance(bus: NatsBus, boot_id: str, spec: ModelSpec) -> None:
    command = StartInstance(instance_id="inst-1", boot_id=boot_id, term=1, model=spec, devices=(0,), budget_ms=20_000)
    assert await ask(bus, subjects.worker_start(NODE), command, CommandReply, timeout_s=5) == Done()


async def is_ready(client: aiohttp.ClientSession) -> bool:
    try:
        return (await client.get("/readyz")).status == 200
    except aiohttp.ClientConnectionError:
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def test_many_streams_at_once_are_token_exact_and_leaving_clients_free_their_slots(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    async with started(nats_url, postgres_url, tmp_path) as system:
        asked = []
        for number in range(32):  # eight times as many as there are slots
            prompt, max_tokens = [3 + number, 7, 11], 20 + number
            stream, ignore_eos = number % 2 == 0, number % 4 < 2
            asked.append((prompt, max_tokens, stream, ignore_eos))
        answers = await asyncio.gather(*(system.ask(p, m, stream=s, ignore_eos=i) for p, m, s, i in asked))
        assert answers == [answer_of(p, m, ignore_eos=i) for p, m, _, i in asked]
        await eventually(lambda: system.instance.finishes == 33, what=lambda: f"all finished; {system.instance}")
        assert system.instance.arrivals == 33, "none was admitted twice"
        assert max(s.instances[0].running for s in system.statuses if s.instances) <= SLOTS

        leaving = [asyncio.create_task(system.ask([n], 2000, stream=n % 2 == 0)) for n in range(SLOTS + 3)]
        await system.running(SLOTS)
        for task in leaving:
            task.cancel()
        await system.running(0)
        await system.exact([99], 10)
        await eventually(lambda: system.instance.arrivals <= 33 + SLOTS + 3 + 1, what="no request came twice")


async def test_an_instance_that_answers_too_late_is_left_with_nothing_to_do(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    async with started(nats_url, postgres_url, tmp_path) as system:
        os.kill(system.instance.pid, signal.SIGSTOP)
        asked = asyncio.create_task(system.ask([1, 2, 3], 200))
        await eventually(lambda: "offer_unanswered" in system.gateways[0].log_text(), what="given up")
        os.kill(system.instance.pid, signal.SIGCONT)
        assert await asked == answer_of([1, 2, 3], 200)
        await system.running(0)


async def test_a_nats_restart_in_the_middle_of_streams_loses_and_doubles_nothing(
    nats_server: NatsServer, postgres_url: str, tmp_path: Path
) -> None:
    async with started(nats_server.url, postgres_url, tmp_path, step_s=0.01) as system:
        came: list[list[bytes]] = [[] for _ in range(SLOTS)]
        streams = [asyncio.create_task(system.ask([n, 8], 1500, events=came[n])) for n in range(SLOTS)]
        await eventually(lambda: all(len(events) > 50 for events in came), what="streams under way")
        nats_server.kill()
        await asyncio.sleep(GATEWAY_LEASE_S + 0.5)
        nats_server.start()
        before = [len(events) for events in came]
        await eventually(
            lambda: all(len(events) > n + 50 for events, n in zip(came, before, strict=True)), what="they go on"
        )
        await system.running(SLOTS)  # and not only because they ended
        assert await asyncio.gather(*streams) == [answer_of([n, 8], 1500) for n in range(SLOTS)]
        await system.running(0)
        await system.exact([77], 10)


async def test_a_gateway_that_stood_still_goes_on_or_says_that_it_cannot(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    async with started(nats_url, postgres_url, tmp_path) as system:
        streams = [asyncio.create_task(system.exact([n, 9], 900)) for n in range(2)]
        await system.running(2)
        await asyncio.sleep(0.3)
        await frozen(system.gateways[0], 3.5)  # longer than silence is borne, shorter than the lease
        await asyncio.gather(*streams)
        await system.running(0)

        lapsing = asyncio.create_task(system.ask([5, 9], 2000))
        await system.running(1)
        await frozen(system.gateways[0], 6.5)
        kept = asyncio.create_task(system.exact([6, 9], 500))  # its keepalives must not hide that the other is gone
        async with asyncio.timeout(10):
            (gone,) = await asyncio.gather(lapsing, return_exceptions=True)
        assert isinstance(gone, AssertionError)
        assert "engine_failed" in str(gone)
        await kept


async def frozen(service: ServiceProcess, seconds: float) -> None:
    os.kill(service.pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    os.kill(service.pid, signal.SIGCONT)


async def test_two_gateways_share_an_instance_without_overrunning_its_slots(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    async with started(nats_url, postgres_url, tmp_path, gateways=2) as system:
        await asyncio.gather(*(system.exact([n, 4], 40 + n, gateway=n % 2) for n in range(32)))
        assert max(s.instances[0].running for s in system.statuses if s.instances) <= SLOTS
        await system.running(0)
        assert system.instance.arrivals == 2 + 32

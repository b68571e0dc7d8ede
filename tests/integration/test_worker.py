"""A real worker process, its zygote and forked instances (sim engine), on real NATS and Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from tests.support.fake_store import FakeStore, fake_store
from tests.support.services import ServiceProcess, alive, eventually, running
from tests.support.tiny_model import write_tiny_model

from stoker_bus.nats import NatsBus
from stoker_bus.port import Message, ask, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode, pack_tokens, unpack_tokens
from stoker_contracts.control import (
    AnnounceTerm,
    CommandReply,
    Done,
    Failed,
    InstanceStatus,
    StartInstance,
    StopInstance,
    TermReply,
    WorkerStatus,
)
from stoker_contracts.inference import (
    Accepted,
    Ack,
    Cancel,
    Finish,
    Frame,
    Frames,
    Generate,
    GenerateReply,
    Sampling,
    Wanted,
)
from stoker_contracts.models import EngineKind, InstanceState, ModelSpec, Tier
from stoker_contracts.storage import LeaseRefused
from stoker_core.clock import SystemClock
from stoker_core.ids import jitter
from stoker_db.pg import PgDatabase
from stoker_storeagent.keep import PoolKeep
from stoker_storeagent.orphans import Orphan, Orphans
from stoker_storeagent.table import ResidentRecord
from stoker_worker.engines.sim import mix, sequence_state

NODE = "node-a"
MIB = 1 << 20


def model(**fields: object) -> ModelSpec:
    base = {
        "model_id": "m-1",
        "name": "tiny",
        "source": "file:///tiny",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "weight_bytes": 64 * MIB,
        "max_model_len": 256,
        "vocab_size": 512,
        "kv_bytes_per_token": 64,
        "kv_cache_bytes": MIB,
        "slots": 2,
        "engine": EngineKind.SIM,
    }
    return ModelSpec(**(base | fields))


@dataclass
class Rig:
    """A worker under test, seen as a leader and a gateway see it."""

    bus: NatsBus
    service: ServiceProcess
    store: FakeStore
    environment: dict[str, str]
    log: Path
    status: WorkerStatus | None = None
    frames: list[Frames] = field(default_factory=list)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def heard(self, message: Message) -> None:
        self.status = decode(WorkerStatus, message.data)

    async def got(self, message: Message) -> None:
        self.frames.append(decode(Frames, message.data))

    async def ready(self) -> WorkerStatus:
        await eventually(lambda: bool(self.status and self.status.zygote_ready), what="zygote ready")
        assert self.status
        return self.status

    def instance(self, instance_id: str) -> InstanceStatus | None:
        listed = self.status.instances if self.status else ()
        return next((i for i in listed if i.instance_id == instance_id), None)

    async def start(self, **fields: object) -> tuple[str, Done | Failed]:
        status = await self.ready()
        command = StartInstance(
            **(
                {
                    "instance_id": f"inst-{next(self.ids)}",
                    "boot_id": status.boot_id,
                    "term": 1,
                    "model": model(),
                    "devices": (0,),
                    "budget_ms": 20_000,
                }
                | fields
            )
        )
        reply = await ask(self.bus, subjects.worker_start(NODE), command, CommandReply, timeout_s=5)
        return command.instance_id, reply

    async def stop(self, instance_id: str, **fields: object) -> Done | Failed:
        status = await self.ready()
        command = StopInstance(**({"instance_id": instance_id, "boot_id": status.boot_id, "term": 1} | fields))
        return await ask(self.bus, subjects.worker_stop(NODE), command, CommandReply, timeout_s=5)

    async def until(self, instance_id: str, state: InstanceState) -> InstanceStatus:
        def reached() -> bool:
            instance = self.instance(instance_id)
            return instance is not None and instance.state == state

        await eventually(reached, what=lambda: f"{instance_id} {state.value}; is {self.instance(instance_id)}")
        found = self.instance(instance_id)
        assert found
        return found

    async def started(self, **fields: object) -> InstanceStatus:
        instance_id, reply = await self.start(**fields)
        assert reply == Done()
        return await self.until(instance_id, InstanceState.READY)

    async def generate(self, instance_id: str, request_id: str, max_tokens: int = 5) -> GenerateReply:
        message = Generate(
            request_id=request_id,
            attempt=1,
            gateway_id="g1",
            prompt=pack_tokens([1, 2, 3]),
            sampling=Sampling(max_tokens=max_tokens),
        )
        return await ask(self.bus, subjects.instance_generate(NODE, instance_id), message, GenerateReply, timeout_s=2)

    def all_frames(self, request_id: str) -> list[Frame]:
        return [f for frames in self.frames for f in frames.frames if f.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        got: list[int] = []
        for frame in self.all_frames(request_id):
            tokens = list(unpack_tokens(frame.tokens))
            if frame.index <= len(got):
                got.extend(tokens[len(got) - frame.index :])
        return got

    def finished(self, request_id: str) -> bool:
        return any(f.finish for f in self.all_frames(request_id))

    async def ack(self, instance_id: str, request_id: str, next_index: int) -> None:
        wanted = (Wanted(request_id=request_id, attempt=1, next=next_index),)
        await send(self.bus, subjects.instance_ack(NODE, instance_id), Ack(gateway_id="g1", wanted=wanted))


def expected_tokens(prompt: list[int], count: int, vocab: int = 512) -> list[int]:
    state, tokens = sequence_state(prompt), []
    for _ in range(count):
        tokens.append((state >> 33) % vocab)
        state = mix(state, tokens[-1])
    return tokens


@pytest.fixture
async def rig(nats_url: str, postgres_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    directory = write_tiny_model(tmp_path / "model", tokenizer=False)
    home = tmp_path / "home"
    environment = {
        "STOKER_HOME": str(home),
        "STOKER_NODE": NODE,
        "STOKER_NATS_URL": nats_url,
        "STOKER_POSTGRES_URL": postgres_url,
        "STOKER_WORKER_DEVICES": "cpu",
        "STOKER_WORKER_ENGINES": "sim",
        "STOKER_WORKER_SLOT_MEMORY_BYTES": str(1024 * MIB),
        "STOKER_WORKER_SIM_STEP_S": "0.005",
        "STOKER_WORKER_INSTANCE_DRAIN_S": "3",
    }
    bus = await NatsBus.connect(nats_url, name="test")
    async with fake_store(home / "nodes" / NODE / "store.sock", directory) as store:
        log = tmp_path / "worker.log"
        with running("stoker_worker", environment, log) as service:
            made = Rig(bus, service, store, environment, log)
            await bus.subscribe(subjects.status_worker(NODE), made.heard)
            await bus.subscribe(subjects.gateway_frames("g1"), made.got)
            await made.ready()
            yield made
    await bus.close()


async def test_an_instance_starts_streams_exact_tokens_and_stops(rig: Rig):
    status = await rig.started()
    assert status.room == 2
    assert status.load_source == Tier.SSD
    assert status.phases.start_ms > 0
    assert abs(status.phases.start_ms - status.age_ms) < 2000
    assert rig.store.open_leases == 0, "the lease ends once the engine has its own copy"

    reply = await rig.generate(status.instance_id, "r1", 20)
    assert reply == Accepted(room=1)
    await eventually(lambda: rig.finished("r1"), what="finish")
    assert rig.tokens("r1") == expected_tokens([1, 2, 3], 20)
    assert rig.all_frames("r1")[-1].finish == Finish.LENGTH
    await rig.ack(status.instance_id, "r1", 21)

    assert await rig.stop(status.instance_id) == Done()
    await rig.until(status.instance_id, InstanceState.STOPPED)
    await eventually(lambda: not alive(status.pid), what="process gone")


async def test_frames_are_sent_again_until_acked(rig: Rig):
    status = await rig.started()
    await rig.generate(status.instance_id, "r1", 3)
    await eventually(lambda: rig.finished("r1"), what="finish")
    before = len(rig.all_frames("r1"))
    await eventually(lambda: len(rig.all_frames("r1")) > before, timeout_s=5, what="sent again")
    await rig.ack(status.instance_id, "r1", 4)

    async def idle() -> bool:
        await rig.ack(status.instance_id, "r1", 4)
        now = rig.instance(status.instance_id)
        return now is not None and now.idle_ms > 0 and now.finishes == 1

    await eventually(idle, what="idle again")


async def test_a_silent_gateway_loses_its_requests_and_the_slots_are_free_again(rig: Rig):
    status = await rig.started()
    await rig.generate(status.instance_id, "r1", 100_000)
    await rig.generate(status.instance_id, "r2", 100_000)
    await eventually(lambda: (rig.instance(status.instance_id) or status).room == 0, what="full")
    await eventually(lambda: (rig.instance(status.instance_id) or status).room == 2, timeout_s=15, what="lapsed")


async def test_cancel_frees_the_slot(rig: Rig):
    status = await rig.started()
    await rig.generate(status.instance_id, "r1", 100_000)
    await send(rig.bus, subjects.instance_cancel(NODE, status.instance_id), Cancel(request_id="r1", attempt=1))
    await eventually(lambda: getattr(rig.instance(status.instance_id), "finishes", 0) == 1, what="cancelled")
    assert (rig.instance(status.instance_id) or status).room == 2


async def test_starts_that_do_not_fit_or_come_from_the_past_are_refused_and_repeats_are_not(rig: Rig):
    status = await rig.started()
    _, too_big = await rig.start(model=model(weight_bytes=400 * MIB), devices=(1,))
    assert isinstance(too_big, Failed)
    assert too_big.code == "device_busy"
    _, taken = await rig.start()
    assert isinstance(taken, Failed)
    assert taken.code == "device_busy"
    _, wrong = await rig.start(boot_id="boot-of-yesterday", devices=(1,))
    assert isinstance(wrong, Failed)
    assert wrong.code == "wrong_boot"
    _, repeat = await rig.start(instance_id=status.instance_id)
    assert repeat == Done()

    answered = await ask(
        rig.bus, subjects.worker_term(NODE), AnnounceTerm(term=9, leader_id="l"), TermReply, timeout_s=2
    )
    assert isinstance(answered, WorkerStatus)
    assert [i.instance_id for i in answered.instances] == [status.instance_id]
    _, stale = await rig.start(term=8, devices=(1,))
    assert isinstance(stale, Failed)
    assert stale.code == "stale_term"


async def test_only_an_idle_instance_stops_when_only_an_idle_one_is_meant(rig: Rig):
    status = await rig.started()
    await rig.generate(status.instance_id, "r1", 100_000)
    refused = await rig.stop(status.instance_id, only_if_idle=True)
    assert isinstance(refused, Failed)
    assert refused.code == "busy"
    await send(rig.bus, subjects.instance_cancel(NODE, status.instance_id), Cancel(request_id="r1", attempt=1))

    async def stopped() -> bool:
        return await rig.stop(status.instance_id, only_if_idle=True) == Done()

    await eventually(stopped, what="stop of the idle one")
    await rig.until(status.instance_id, InstanceState.STOPPED)


async def test_a_killed_instance_is_reported_at_once_and_its_device_is_free(rig: Rig):
    status = await rig.started()
    loop = asyncio.get_running_loop()
    os.kill(status.pid, signal.SIGKILL)
    killed_at = loop.time()
    failed = await rig.until(status.instance_id, InstanceState.FAILED)
    assert loop.time() - killed_at < 1.0, "not only with the next heartbeat"
    assert "SIGKILL" in failed.failure
    await rig.started()


async def test_a_refused_lease_fails_the_start_with_its_reason(rig: Rig):
    rig.store.refuse = LeaseRefused(code="corrupt_checkpoint", message="model.safetensors: digest differs")
    instance_id, reply = await rig.start()
    assert reply == Done()
    failed = await rig.until(instance_id, InstanceState.FAILED)
    assert "digest differs" in failed.failure


async def test_an_instance_that_waits_for_its_files_stops_at_once_and_its_device_is_free(rig: Rig):
    rig.store.silent = True
    instance_id, _ = await rig.start()
    await eventually(lambda: rig.store.open_leases == 1, what="it asks for its files")
    pid = (await rig.until(instance_id, InstanceState.STARTING)).pid
    asked_at = asyncio.get_running_loop().time()
    assert await rig.stop(instance_id) == Done()
    stopped = await rig.until(instance_id, InstanceState.STOPPED)
    assert asyncio.get_running_loop().time() - asked_at < 3.0, "long before it would be killed for being late"
    assert stopped.failure == ""
    await eventually(lambda: not alive(pid), what="process gone")
    rig.store.silent = False
    await rig.started()


async def test_a_start_over_its_budget_is_ended(rig: Rig):
    rig.store.refuse = None
    instance_id, _ = await rig.start(budget_ms=1)
    failed = await rig.until(instance_id, InstanceState.FAILED)
    assert "not ready within" in failed.failure


async def test_kill_9_of_the_worker_leaves_no_process_and_the_next_boot_refuses_old_orders(rig: Rig):
    status = await rig.started()
    await ask(rig.bus, subjects.worker_term(NODE), AnnounceTerm(term=5, leader_id="l"), TermReply, timeout_s=2)
    old = await rig.ready()
    children = [int(p) for p in Path(f"/proc/{rig.service.pid}/task/{rig.service.pid}/children").read_text().split()]
    rig.service.kill()
    await eventually(lambda: not any(alive(p) for p in [status.pid, *children]), timeout_s=5, what="all gone")

    with running("stoker_worker", rig.environment, rig.log):
        await eventually(
            lambda: bool(rig.status and rig.status.boot_id != old.boot_id and rig.status.zygote_ready), what="new boot"
        )
        assert rig.status
        assert rig.status.instances == ()
        assert rig.status.term == 5, "the highest term survives the worker"
        _, refused = await rig.start(boot_id=old.boot_id, term=5)
        assert isinstance(refused, Failed)
        assert refused.code == "wrong_boot"


async def test_a_killed_zygote_fails_its_instances_and_comes_back(rig: Rig):
    status = await rig.started()
    (zygote,) = Path(f"/proc/{rig.service.pid}/task/{rig.service.pid}/children").read_text().split()
    os.kill(int(zygote), signal.SIGKILL)
    failed = await rig.until(status.instance_id, InstanceState.FAILED)
    assert "zygote" in failed.failure
    await eventually(lambda: not alive(status.pid), timeout_s=5, what="its children gone")
    await eventually(lambda: bool(rig.status and rig.status.zygote_ready), what="zygote back")
    await rig.started()


async def test_sigterm_finishes_what_is_in_hand_and_ends_everything(rig: Rig, postgres_url: str):
    status = await rig.started()
    await rig.generate(status.instance_id, "r1", 100)
    loop = asyncio.get_running_loop()

    async def keep_acking() -> None:
        while True:
            await rig.ack(status.instance_id, "r1", len(rig.tokens("r1")) + rig.finished("r1"))
            await asyncio.sleep(0.1)

    acking = asyncio.create_task(keep_acking())
    code = await loop.run_in_executor(None, rig.service.terminate)
    acking.cancel()
    assert code == 0
    assert rig.tokens("r1") == expected_tokens([1, 2, 3], 100)
    assert not alive(status.pid)
    database = await PgDatabase.connect(postgres_url)
    assert await database.nodes.get(NODE) is None, "a node that leaves in order is no member any more"
    await database.close()


async def test_a_second_worker_of_the_same_node_does_not_take_over_a_live_one(rig: Rig, postgres_url: str):
    environment = rig.environment | {"STOKER_HOME": str(rig.log.parent / "second")}
    with running("stoker_worker", environment, rig.log.parent / "second.log") as second:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, second.process.wait, 20) == 1
        assert "node_taken" in second.log_text() or "NodeTaken" in second.log_text()
    database = await PgDatabase.connect(postgres_url)
    registered = await database.nodes.get(NODE)
    await database.close()
    assert registered
    assert registered.boot_id == (await rig.ready()).boot_id
    assert [msgspec.to_builtins(d) for d in registered.devices] == [
        msgspec.to_builtins(d) for d in (await rig.ready()).devices
    ]


async def test_instances_stopped_in_the_middle_of_a_step_end_in_order_every_time(rig: Rig):
    for number in range(8):
        status = await rig.started()
        request_id = f"r{number}"
        await rig.generate(status.instance_id, request_id, 100_000)
        await send(
            rig.bus, subjects.instance_cancel(NODE, status.instance_id), Cancel(request_id=request_id, attempt=1)
        )
        assert await rig.stop(status.instance_id) == Done()
        await rig.until(status.instance_id, InstanceState.STOPPED)


@contextlib.asynccontextmanager
async def kept(
    agent: PoolKeep, descriptors: tuple[int, int], orphans: Orphans, ended: list[Orphan]
) -> AsyncIterator[None]:
    """While an agent runs. Like one that is killed it takes no leave."""
    keeping = asyncio.ensure_future(agent.part(descriptors, orphans, ended.extend).run())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


async def test_a_worker_keeps_the_pool_of_an_agent_that_dies_and_says_who_may_read_from_it(rig: Rig):
    """The agents are the test's."""
    path = Path(rig.environment["STOKER_HOME"]) / "nodes" / NODE / "keeper.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    rig.store.silent = True
    starting, _ = await rig.start()
    await eventually(lambda: rig.store.open_leases == 1, what="it waits for its lease")
    ended: list[Orphan] = []
    first, second = (PoolKeep(path, boot_id=name, clock=SystemClock(), jitter=jitter) for name in ("first", "second"))
    assert await first.take(timeout_s=5) is None
    pool, table = os.memfd_create("pool"), os.memfd_create("table")
    os.pwrite(pool, b"pool", 0)
    async with kept(first, (pool, table), Orphans((), ()), ended):
        await eventually(lambda: "pool_kept" in rig.service.log_text())
    os.close(pool)
    os.close(table)

    taken = await second.take(timeout_s=5)
    assert taken
    assert taken.loading == (starting,)
    assert os.pread(taken.pool_fd, 4, 0) == b"pool"
    record = ResidentRecord(model_id="m-1", chunks=(0,), complete=True, holders=(starting, "another"))
    orphans = Orphans([record], taken.loading)
    async with kept(second, (taken.pool_fd, taken.table_fd), orphans, ended):
        assert await rig.stop(starting) == Done()
        await eventually(lambda: ended == [Orphan(0, starting)])
    taken.close()

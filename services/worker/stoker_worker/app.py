"""The worker's composition root: the one place where its concrete parts are chosen."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack

from stoker_bus.events import EventPublisher
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus
from stoker_contracts import events, subjects
from stoker_contracts.codec import encode
from stoker_contracts.control import AnnounceTerm
from stoker_contracts.models import DeviceKind, EngineKind
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import DatabaseUnavailable, Disconnected, NodeTaken, NoResponders, RequestTimeout
from stoker_core.ids import RandomIds
from stoker_core.logging import get_logger
from stoker_core.runner import Part, run_parts
from stoker_core.unix import listen
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, NodeRow
from stoker_worker.adapters.term_file import TermFile
from stoker_worker.devices import discover
from stoker_worker.handlers import Handlers
from stoker_worker.keeper import PoolKeeper
from stoker_worker.loops import StatusReporter
from stoker_worker.manager import InstanceManager
from stoker_worker.prepare import Preparer
from stoker_worker.processes import PidFiles
from stoker_worker.settings import WorkerSettings
from stoker_worker.state import WorkerState
from stoker_worker.zygote.client import Zygote

log = get_logger("worker")

_LEFTOVERS_S = 10.0
_ALIVE_ANSWER_S = 1.0
_REGISTER_RETRY_S = 0.5


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    clock, ids = SystemClock(), RandomIds()
    directory = settings.node_directory / "worker"
    directory.mkdir(parents=True, exist_ok=True)
    pid_files = PidFiles(directory / "pids")
    leftovers = pid_files.end_leftovers(timeout_s=_LEFTOVERS_S)
    if leftovers:
        log.warning("leftovers_ended", processes=leftovers)
    devices = discover(settings)
    terms = TermFile(directory / "term")
    state = WorkerState(
        node=settings.node,
        boot_id=ids.new("boot"),
        devices=devices,
        engines=settings.engine_kinds,
        term=terms.load(),
    )

    async with AsyncExitStack() as stack:
        bus = await NatsBus.connect(settings.nats_url, name=f"worker {settings.node}")
        stack.push_async_callback(bus.close)
        database = await PgDatabase.connect(settings.postgres_url)
        stack.push_async_callback(database.close)
        publisher = EventPublisher(
            bus, service="worker", name=settings.node, boot_id=state.boot_id, clock=clock, ids=ids
        )

        zygotes: dict[EngineKind, Zygote] = {}
        reporter = StatusReporter(bus, state, clock, lambda engine: zygotes[engine].ready)
        # Not before now: whoever connects is answered within moments.
        listener = listen(settings.keeper_path, setting="STOKER_WORKER_KEEPER_SOCKET", who="worker")
        keeper = PoolKeeper(listener, state.starting)
        stack.callback(keeper.close)

        def instances_changed() -> None:
            reporter.changed()
            keeper.changed()

        preparer = Preparer(state, zygotes, timeout_s=settings.prepare_timeout_s, changed=reporter.changed)
        manager = InstanceManager(settings, state, zygotes, preparer, pid_files, publisher, clock, instances_changed)
        environment = engine_environment(settings, os.environ)
        cuda = any(device.kind == DeviceKind.CUDA for device in devices)
        for engine in settings.engine_kinds:
            zygotes[engine] = Zygote(
                engine,
                environment=environment,
                cuda=cuda,
                ready_timeout_s=settings.zygote_timeout_s,
                listener=manager,
            )
        handlers = Handlers(bus, state, manager, preparer, terms, reporter)

        async def intake() -> None:
            await register(bus, database, NodeRow(name=state.node, boot_id=state.boot_id, devices=devices), clock)
            publisher.emit(events.NODE_JOINED, state.node, devices=[f"{d.kind.value}: {d.name}" for d in devices])
            node = settings.node
            await bus.subscribe(subjects.worker_start(node), handlers.start)
            await bus.subscribe(subjects.worker_stop(node), handlers.stop, concurrency=16)
            await bus.subscribe(subjects.worker_prepare(node), handlers.prepare)
            await bus.subscribe(subjects.worker_drain(node), handlers.drain)
            await bus.subscribe(subjects.worker_term(node), handlers.term)
            await reporter.run()

        async def drain() -> None:
            await manager.stop_all()
            publisher.emit(events.NODE_LEFT, state.node)
            await reporter.report()
            await publisher.drained()
            await database.nodes.leave(state.node, state.boot_id)

        def stop_intake() -> None:
            state.leaving = True
            reporter.changed()

        parts = [
            publisher.part(),
            Part("instances", manager.run),
            keeper.part(),
            Part("intake", intake, stop_intake=stop_intake, drain=drain),
            *(Part(f"zygote {engine.value}", zygote.run) for engine, zygote in zygotes.items()),
        ]
        log.info("worker_started", boot_id=state.boot_id, devices=len(devices), term=state.term)
        await run_parts(parts, stop, drain_s=settings.drain_s)


def engine_environment(settings: WorkerSettings, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of zygotes: offline, in-process engines, one OpenMP thread until an instance says otherwise."""
    environment = {key: value for key, value in base.items() if not key.startswith("STOKER_")}
    # It would silently override the size that every instance is given.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return environment | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(settings.cache_directory),
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_LOGGING_LEVEL": environment.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
    }


async def register(bus: Bus, database: Database, node: NodeRow, clock: Clock) -> None:
    """Take the node's name by compare-and-set. Raises NodeTaken if its present holder answers."""
    while True:
        try:
            current = await database.nodes.get(node.name)
            if current is not None and current.boot_id != node.boot_id:
                await _check_gone(bus, current)
            await database.nodes.register(node, replaces=current.boot_id if current else None)
            return
        except (DatabaseUnavailable, Disconnected) as error:
            log.warning("register_waits", error=error.message)
            await clock.sleep(_REGISTER_RETRY_S)


async def _check_gone(bus: Bus, current: NodeRow) -> None:
    subject = subjects.worker_term(current.name)
    # Term 0 is below every leader's: whoever lives refuses it, and shows by answering that it lives.
    question = encode(AnnounceTerm(term=0, leader_id=""), subject=subject)
    try:
        await bus.request(subject, question, timeout_s=_ALIVE_ANSWER_S)
    except (NoResponders, RequestTimeout):
        return
    raise NodeTaken(current.name, current.boot_id)

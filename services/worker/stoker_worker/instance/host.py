"""Builds the engine and steps it, in the instance's main thread; requests come and outputs go through queues."""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from stoker_contracts.inference import Finish
from stoker_contracts.models import DeviceKind, EngineKind, StartPhases
from stoker_core.errors import EngineFailed, InvalidRequest
from stoker_core.logging import get_logger
from stoker_worker.engines.base import Engine, EngineOutput, EngineRequest
from stoker_worker.instance.lease import Lease
from stoker_worker.wire import EngineReady, InstanceConfig

log = get_logger("instance")


@dataclass(frozen=True, slots=True)
class Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    key: str


@dataclass(frozen=True, slots=True)
class Quit:
    pass


HostCommand = Add | Abort | Quit
CommandQueue = queue.SimpleQueue[HostCommand]
"""Bounded by the instance's slots: one Add and one Abort for each admitted request."""


def build_engine(config: InstanceConfig, lease: Lease) -> Engine:
    """The engine ends the lease, as soon as the weights are its own. Raises EngineFailed, and what the loader raises."""
    if config.model.engine == EngineKind.SIM:
        from stoker_worker.engines.sim import SimEngine

        return SimEngine(config.model, lease, step_s=config.sim_step_s)
    if config.model.engine == EngineKind.VLLM:
        import torch

        from stoker_worker.engines.vllm import VllmEngine

        if config.device_kind == DeviceKind.CPU:
            torch.set_num_threads(config.threads)
        return VllmEngine(
            config.model,
            lease.path,
            lease=lease,
            device=config.device_kind,
            device_bytes=config.device_bytes,
            batched_tokens_max=config.batched_tokens_max,
        )
    raise EngineFailed(f"this worker has no engine {config.model.engine.value!r}")


def start_engine(config: InstanceConfig, *, forked_at_s: float) -> tuple[Engine, EngineReady]:
    """Lease the files and build the engine. Raises EngineFailed (LeaseDenied among them), and what the loader raises."""
    with Lease(
        config.store_socket,
        model_id=config.model.model_id,
        instance_id=config.instance_id,
        timeout_s=config.lease_timeout_s,
        device=_ring_device(config),
    ) as lease:
        leased_at_s = time.monotonic()
        engine = build_engine(config, lease)
        source, origin = lease.granted.source, lease.granted.origin
    gc.collect()
    gc.freeze()  # what the engine is made of stays; a full collection would stall a step
    ready_at_s = time.monotonic()
    phases = StartPhases(
        fork_ms=(forked_at_s - config.started_at_s) * 1e3,
        lease_ms=(leased_at_s - forked_at_s) * 1e3,
        load_ms=engine.load_ms,
        engine_ms=(ready_at_s - leased_at_s) * 1e3 - engine.load_ms,
    )
    return engine, EngineReady(phases=phases, load_source=source, load_origin=origin, ready_at_s=ready_at_s)


def _ring_device(config: InstanceConfig) -> str:
    """The GPU that weights are to arrive on, by UUID; empty: they are taken from the pool.

    A ring has one consumer, so tensor-parallel ranks, who share a lease, get none.
    """
    if config.device_kind != DeviceKind.CUDA or config.model.engine != EngineKind.VLLM or len(config.devices) != 1:
        return ""
    from stoker_worker.devices import cuda_uuid

    return cuda_uuid(config.devices[0])


def run_engine(engine: Engine, commands: CommandQueue, deliver: Callable[[list[EngineOutput]], None]) -> None:
    """Step while there is work, sleep while there is none, until Quit. Raises EngineFailed."""
    while True:
        if not engine.has_work() and not _apply(engine, commands.get(), deliver):
            return
        while True:
            try:
                command = commands.get_nowait()
            except queue.Empty:
                break
            if not _apply(engine, command, deliver):
                return
        if engine.has_work():
            deliver(engine.step())


def _apply(engine: Engine, command: HostCommand, deliver: Callable[[list[EngineOutput]], None]) -> bool:
    match command:
        case Quit():
            return False
        case Abort(key=key):
            engine.abort(key)
        case Add(request=request):
            try:
                engine.add(request)
            except InvalidRequest as error:
                deliver([EngineOutput(request.key, (), Finish.ERROR, error.message)])
    return True

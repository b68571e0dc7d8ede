"""Settings of the worker: `STOKER_WORKER_…`, beside the shared ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from stoker_contracts.models import EngineKind
from stoker_core.errors import InvalidSettings
from stoker_core.settings import SharedSettings


class WorkerSettings(SharedSettings, frozen=True):
    SCOPE: ClassVar[str] = "worker"

    devices: str = "auto"  # auto: GPUs where there are any, else CPU slots | cpu | cuda
    cpu_slots: int = 2  # instances that run side by side on CPUs; cores and memory are divided among them
    slot_memory_bytes: int = 0  # of one CPU slot; 0: three fifths of the machine's memory, divided
    engines: str = "vllm,sim"
    batched_tokens_max: int = 512  # of one engine step: bounds how long a prefill holds up others' tokens
    lease_timeout_s: float = 600.0  # how long a start waits for the storage agent
    instance_drain_s: float = 10.0
    prepare_timeout_s: float = 60.0
    zygote_timeout_s: float = 120.0
    sim_step_s: float = 0.02
    store_socket: Path | None = None  # default: <home>/nodes/<node>/store.sock
    keeper_socket: Path | None = None  # default: <home>/nodes/<node>/keeper.sock

    def __post_init__(self) -> None:
        if self.devices not in ("auto", "cpu", "cuda"):
            raise InvalidSettings(f"STOKER_WORKER_DEVICES: {self.devices!r} is none of auto, cpu, cuda")
        if not 1 <= self.cpu_slots <= 64:
            raise InvalidSettings("STOKER_WORKER_CPU_SLOTS must be between 1 and 64")
        if not self.engine_kinds:
            raise InvalidSettings("STOKER_WORKER_ENGINES names no engine")

    @property
    def engine_kinds(self) -> tuple[EngineKind, ...]:
        """Raises InvalidSettings for an unknown engine."""
        kinds = []
        for name in filter(None, (part.strip() for part in self.engines.split(","))):
            kind = EngineKind(name)
            if kind == EngineKind.UNKNOWN:
                raise InvalidSettings(f"STOKER_WORKER_ENGINES: {name!r} is none of vllm, sim")
            kinds.append(kind)
        return tuple(kinds)

    @property
    def node_directory(self) -> Path:
        return self.home / "nodes" / self.node

    @property
    def socket_path(self) -> Path:
        return self.store_socket or self.node_directory / "store.sock"

    @property
    def keeper_path(self) -> Path:
        return self.keeper_socket or self.node_directory / "keeper.sock"

    @property
    def cache_directory(self) -> Path:
        return self.home / "cache" / "vllm"

    @property
    def threads(self) -> int:
        """OpenMP threads of one CPU instance: those of all slots together never exceed the cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.cpu_slots)

"""One example of every message type as version 1.0 had it, and what a kept fixture of it is called.

The fixtures under tests/contract/fixtures are bytes as that version sent them. They are never made anew:
a change that needs that is a change that running processes of the other version do not understand.
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from stoker_contracts import control, decisions, events, inference, keeping, models, storage
from stoker_contracts.codec import Contract, OpenEnum, pack_tokens
from stoker_contracts.control import (
    AnnounceTerm,
    CancelPrefetch,
    Demand,
    Done,
    DrainNode,
    EvictModel,
    Failed,
    HeldModel,
    InstanceStatus,
    LinkStatus,
    Locate,
    Located,
    PrefetchModel,
    PrepareModel,
    Registered,
    RegisterModel,
    StartInstance,
    StopInstance,
    StoreStatus,
    TierStatus,
    WantDrain,
    WantPrefetch,
    WorkerStatus,
)
from stoker_contracts.decisions import DecisionRecord, OptionRecord, Outcome, StagePrediction, StartupPrediction
from stoker_contracts.events import CloudEvent
from stoker_contracts.inference import (
    Accepted,
    Ack,
    Cancel,
    Finish,
    Frame,
    Frames,
    Generate,
    Refused,
    RefusedReason,
    Sampling,
    Wanted,
)
from stoker_contracts.keeping import Drop, Keep, KeeperHello, Keeping, Kept, Loaded
from stoker_contracts.models import (
    Device,
    DeviceKind,
    EngineKind,
    InstanceState,
    ModelOptions,
    ModelSpec,
    StartPhases,
    Tier,
)
from stoker_contracts.storage import LeaseGranted, LeaseProgress, LeaseRefused, LeaseRequest, LeaseUsed

FIXTURES = Path(__file__).parents[1] / "contract" / "fixtures"
MODULES: tuple[ModuleType, ...] = (inference, control, events, storage, keeping, models, decisions)
PARTS: tuple[type[Contract], ...] = (
    Sampling,
    Frame,
    Wanted,
    InstanceStatus,
    TierStatus,
    HeldModel,
    LinkStatus,
    ModelOptions,
    ModelSpec,
    Device,
    StartPhases,
    StagePrediction,
    StartupPrediction,
    OptionRecord,
    Outcome,
    DecisionRecord,
)
"""Contracts that travel only inside others, or are only stored."""

MODEL = ModelSpec(
    model_id="model-0001",
    name="smollm2-135m",
    source="file:///models/smollm2",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    weight_bytes=269_060_552,
    max_model_len=2048,
    vocab_size=49152,
    kv_bytes_per_token=23040,
    kv_cache_bytes=268_435_456,
    slots=8,
    engine=EngineKind.SIM,
    keep_alive_s=12.5,
    queue_max=16,
    wait_s=30.0,
)
INSTANCE = InstanceStatus(
    instance_id="inst-0001",
    model_id="model-0001",
    model="smollm2-135m",
    state=InstanceState.READY,
    devices=(0, 1),
    room=7,
    running=1,
    arrivals=12,
    finishes=11,
    idle_ms=0,
    age_ms=60_000,
    pid=4242,
    phases=StartPhases(fork_ms=12.5, lease_ms=1.0, load_ms=180.25, engine_ms=900.0, announce_ms=2.0),
    load_source=Tier.SSD,
    failure="",
    engine="sim",
)

EXAMPLES: tuple[Contract, ...] = (
    Generate(
        request_id="req-0001",
        attempt=2,
        gateway_id="gw-0001",
        prompt=pack_tokens([1, 49151, 70000]),
        sampling=Sampling(
            max_tokens=64, temperature=0.0, top_p=0.9, top_k=40, seed=7, stop_token_ids=(2, 0), ignore_eos=True
        ),
        generated=pack_tokens([5, 6]),
        cache_salt="5a17",
        budget_ms=30_000,
    ),
    Accepted(room=3),
    Refused(reason=RefusedReason.STOPPING, retry_after_ms=250, message="stops"),
    Frames(
        node="node-1",
        instance_id="inst-0001",
        frames=(
            Frame(request_id="req-0001", attempt=2, index=2, tokens=pack_tokens([9, 10]), finish=Finish.LENGTH),
            Frame(request_id="req-0002", attempt=1, index=0, error="engine_failed", finish=Finish.ERROR),
        ),
        room=6,
        steps=1234,
    ),
    Ack(gateway_id="gw-0001", wanted=(Wanted(request_id="req-0001", attempt=2, next=4),)),
    Cancel(request_id="req-0001", attempt=2),
    Demand(gateway_id="gw-0001", model_id="model-0001", queued=3, oldest_wait_ms=1500),
    StartInstance(instance_id="inst-0001", boot_id="boot-0001", term=4, model=MODEL, devices=(0, 1), budget_ms=60_000),
    StopInstance(instance_id="inst-0001", boot_id="boot-0001", term=4, only_if_idle=True, reason="idle"),
    PrepareModel(boot_id="boot-0001", term=4, model=MODEL),
    DrainNode(boot_id="boot-0001", term=4, draining=True),
    WantDrain(node="node-1", undo=True),
    AnnounceTerm(term=4, leader_id="sched-0001"),
    Done(),
    Failed(code="device_busy", message="no room", retryable=True),
    WorkerStatus(
        node="node-1",
        boot_id="boot-0001",
        seq=99,
        term=4,
        devices=(Device(index=0, kind=DeviceKind.CPU, name="cpu slot 0", memory_bytes=8_000_000_000),),
        instances=(INSTANCE,),
        prepared=("LlamaForCausalLM",),
        zygote_ready=True,
        draining=True,
        protocol=0,
    ),
    StoreStatus(
        node="node-1",
        boot_id="boot-0002",
        seq=7,
        tiers=(
            TierStatus(
                tier=Tier.SSD,
                capacity_bytes=100_000_000_000,
                used_bytes=269_060_552,
                hits=5,
                misses=1,
                queue=2,
                read_bytes_per_s=1.5e9,
            ),
        ),
        held=(
            HeldModel(model_id="model-0001", tier=Tier.SSD, held_bytes=269_060_552, total_bytes=269_060_552, leases=1),
        ),
        protocol=0,
    ),
    RegisterModel(
        name="smollm2-135m",
        source="file:///models/smollm2",
        options=ModelOptions(
            engine=EngineKind.SIM,
            dtype="float32",
            max_model_len=1024,
            kv_cache_bytes=1_000_000,
            slots=4,
            keep_alive_s=5.0,
            queue_max=10,
            wait_s=20.0,
        ),
    ),
    Registered(model=MODEL, created=True, files=6, total_bytes=271_000_000),
    WantPrefetch(
        model_id="model-0001",
        nodes=("node-1", "node-2"),
        tier=Tier.SSD,
        priority=-1,
        budget_ms=30_000,
        cancel=True,
    ),
    PrefetchModel(
        model_id="model-0001", tier=Tier.DRAM, term=4, priority=2, budget_ms=30_000, sources=("node-2", "node-3")
    ),
    CancelPrefetch(model_id="model-0001", term=4),
    EvictModel(model_id="model-0001", tier=Tier.SSD, term=4),
    Locate(model_id="model-0001", node="node-1"),
    Located(
        node="node-2",
        address="10.0.0.2:7443",
        held_bytes=134_217_728,
        total_bytes=269_060_552,
        receiving=True,
        upstream=("node-3", "node-4"),
        serving=1,
    ),
    CloudEvent(
        id="event-0001",
        source="/stoker/worker/node-1",
        type="stoker.instance.ready",
        time="2026-11-20T12:00:00.000000Z",
        subject="inst-0001",
        bootid="boot-0001",
        sequence="000000000042",
        specversion="1.0",
        datacontenttype="application/json",
        data={"model": "smollm2-135m", "start_ms": 1234.5, "devices": [0]},
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    LeaseRequest(model_id="model-0001", instance_id="inst-0001"),
    LeaseProgress(done_bytes=16_777_216, total_bytes=269_060_552),
    LeaseGranted(
        path="/home/user/.stoker/nodes/node-1/ssd/x", source=Tier.REMOTE, total_bytes=269_060_552, wait_ms=3.5
    ),
    LeaseRefused(code="tier_full", message="no room", retryable=True),
    LeaseUsed(load_ms=180.25, read_bytes=269_060_552),
    KeeperHello(boot_id="boot-0002"),
    Kept(loading=("inst-0001", "inst-0002"), kept=True),
    Keep(),
    Drop(),
    Keeping(),
    Loaded(instance_id="inst-0001"),
)


def declared() -> list[type[Contract]]:
    """Every Contract subclass of the contracts' modules."""
    found = [
        member
        for module in MODULES
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Contract) and member.__module__ == module.__name__
    ]
    return sorted(found, key=lambda kind: kind.__name__)


def fixture(example: Contract, version: str) -> Path:
    suffix = "json" if example.FORMAT == "json" else "hex"
    return FIXTURES / version / f"{type(example).__name__}.{suffix}"


def from_fixture(example: Contract, version: str) -> bytes:
    path = fixture(example, version)
    return path.read_bytes() if example.FORMAT == "json" else bytes.fromhex(path.read_text())


def all_enums_unknown(value: Any) -> Any:
    """`value` as an older reader sees it when every enum in it has a newer value."""
    if isinstance(value, OpenEnum):
        return type(value)("unknown")
    if isinstance(value, Contract):
        changed = {f.name: all_enums_unknown(getattr(value, f.name)) for f in msgspec.structs.fields(value)}
        return msgspec.structs.replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(all_enums_unknown(item) for item in value)
    assert not isinstance(value, Enum), "enums of messages are open ones"
    return value

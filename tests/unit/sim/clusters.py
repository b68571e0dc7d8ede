"""A small cluster whose times are round: 10 GB models at 1 GB/s from the store, 2 GB/s from the SSD, 10 GB/s to a device."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from stoker_sim.cluster import Measured, Setup, World, build
from stoker_sim.cluster.floor import Physics
from stoker_sim.profiles import Devices, Hardware, LoaderProfile, ModelProfile, NodeKind, Profile
from stoker_sim.workload import Arrival

GB = 10**9
REMOTE_S, SSD_S, DRAM_S = 10.0, 5.0, 1.0
"""A load from there."""


def profile(
    *, nodes: int = 2, devices: int = 1, models: int = 4, dram_gb: int = 100, ssd_gb: int = 1000, slots: int = 1
) -> Profile:
    """Prefills are 1,000 tokens/s, a token takes 0.1 s. Loaders reach all of every bandwidth, at no fixed cost."""
    kind = NodeKind(
        name="n",
        count=nodes,
        devices=Devices(count=devices, memory_bytes=16 * GB, pcie_bytes_per_s=10e9),
        dram_bytes=dram_gb * GB,
        ssd_bytes=ssd_gb * GB,
        ssd_bytes_per_s=2e9,
        network_bytes_per_s=1e9,
        remote_bytes_per_s=1e9,
    )
    model = ModelProfile(
        name="m",
        count=models,
        weight_bytes=10 * GB,
        kv_bytes_per_token=1000,
        kv_cache_bytes=10 * 1000 * 1000,
        prefill_tokens_per_s=1000.0,
        decode_s_per_token=0.1,
        context_tokens=4096,
        slots=slots,
    )
    loaders = tuple(
        LoaderProfile(
            name=name, remote=1.0, peer=1.0, ssd=1.0, dram=1.0, fixed_s=0.0, pipelined=True, engine_start_s=0.0
        )
        for name in ("safetensors", "serverlessllm", "stoker")
    )
    return Profile(hardware=Hardware(nodes=(kind,)), models=(model,), loaders=loaders)


EXACT = Physics(stop_s=0.0, handoff_s=0.1, decision_s=0.0, timeout_s=300.0)
"""Nothing takes time but what a test is about."""


def world(policy: str, of: Profile | None = None, *, seed: int = 1, physics: Physics = EXACT, **setup: float) -> World:
    return build(of or profile(), policy, seed=seed, setup=Setup(physics=physics, **setup))  # type: ignore[arg-type]


def ask(at_s: float, model: str, prompt: int = 100, output: int = 10) -> Arrival:
    return Arrival(at_s=at_s, model=model, prompt_tokens=prompt, output_tokens=output)


def run(policy: str, arrivals: Iterable[Arrival], of: Profile | None = None, **options: float) -> Measured:
    return world(policy, of, **options).run(arrivals)  # type: ignore[arg-type]


def slow(physics: Physics = EXACT, **changes: float) -> Physics:
    return msgspec.structs.replace(physics, **changes)

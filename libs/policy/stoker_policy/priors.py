"""What is assumed of hardware and engines until something was observed."""

from __future__ import annotations

import msgspec


class Priors(msgspec.Struct, frozen=True, kw_only=True):
    """Bandwidths end to end, in bytes/s; durations in seconds. A simulator gives its hardware's own.

    Unless said otherwise measured on a machine with 2 cores and a virtual disk (docs/benchmarks.md, docs/decisions/0002).
    """

    remote_bytes_per_s: float = 0.5e9  # S3 over HTTP gave 0.7, with nothing between
    peer_bytes_per_s: float = 1.0e9
    ssd_bytes_per_s: float = 2.0e9
    dram_bytes_per_s: float = (
        4.0e9  # the pool to an engine's own memory: a copy. An engine that copies nothing is far faster
    )
    bandwidth_spread: float = 1.0

    overhead_s: float = 0.03  # of any load: the lease, the mapping, a walk through the model's parameters

    vllm_cold_s: float = 29.0  # eager; all imports to be paid
    vllm_zygote_s: float = 1.3  # 1.1 to 1.8 with the load
    vllm_asleep_s: float = 0.3  # assumed: nothing here has slept yet
    sim_cold_s: float = 2.0  # assumed: an interpreter and its imports
    sim_zygote_s: float = 0.2  # assumed: a fork and a connection
    sim_asleep_s: float = 0.1  # assumed
    engine_spread: float = 0.7

    # ServerlessLLM's constants for resuming from tokens: 0.01 s × tokens + 0.1 s.
    migration_s_per_token: float = 0.01
    migration_s: float = 0.1
    migration_spread: float = 1.0

    output_tokens: float = 200.0  # left of a request, however many it has
    output_spread: float = 1.0


# Beyond these an observation is nonsense, on any hardware there is.
BYTES_PER_S_MAX = 1e13  # the memory of one GPU gives 0.8e13
BYTES_MAX = 1 << 47  # 128 TiB in one model
SECONDS_MAX = 24 * 3600.0
TOKENS_MAX = 1 << 26

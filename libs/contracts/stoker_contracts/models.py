"""What a model, a device and an instance are, wherever they are spoken of."""

from __future__ import annotations

from stoker_contracts.codec import Contract, OpenEnum


class EngineKind(OpenEnum):
    VLLM = "vllm"
    SIM = "sim"  # no model: a deterministic next token; control-plane tests and load only
    UNKNOWN = "unknown"


class DeviceKind(OpenEnum):
    CPU = "cpu"
    CUDA = "cuda"
    UNKNOWN = "unknown"


class Tier(OpenEnum):
    """Where bytes of a model lie, slowest first. remote: the model's own source; peer: another node's storage agent."""

    REMOTE = "remote"
    PEER = "peer"
    SSD = "ssd"
    DRAM = "dram"
    GPU = "gpu"
    UNKNOWN = "unknown"


class InstanceState(OpenEnum):
    """starting → ready → stopping → stopped; failed from any of them."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"


LIVE_STATES = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING})


class ModelOptions(Contract, frozen=True):
    """What `stoker deploy` may set. None means: derived from the checkpoint."""

    engine: EngineKind = EngineKind.VLLM
    dtype: str = "auto"  # auto (the checkpoint's own) | bfloat16 | float16 | float32
    max_model_len: int | None = None  # tokens
    kv_cache_bytes: int | None = None
    slots: int = 8  # requests in one engine batch
    keep_alive_s: float = 60.0  # idle time after which an instance stops
    queue_max: int = 64  # waiting requests per gateway
    wait_s: float = 60.0  # how long a request waits for an instance
    tensor_parallel: int = 1  # devices of one node that an instance is split over
    min_replicas: int = 0  # instances that stay without load
    max_replicas: int = 1
    target_concurrency: float = 0.0  # requests in hand per instance; 0: 0.7 of its slots
    keep_alive_auto: bool = False  # learned from its idle times; keep_alive_s until enough of them were seen


class ModelSpec(Contract, frozen=True):
    """A registered model, as the scheduler places it and an engine starts it."""

    model_id: str  # one registration; never reused
    name: str  # what requests say
    source: str  # file:///directory or s3://bucket/prefix: where its files come from
    architecture: str  # e.g. LlamaForCausalLM
    dtype: str  # as run: bfloat16 | float16 | float32
    weight_bytes: int
    max_model_len: int  # tokens, prompt and completion together
    vocab_size: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    slots: int
    engine: EngineKind = EngineKind.VLLM
    keep_alive_s: float = 60.0
    queue_max: int = 64
    wait_s: float = 60.0
    tensor_parallel: int = 1
    min_replicas: int = 0
    max_replicas: int = 1
    target_concurrency: float = 0.0
    keep_alive_auto: bool = False

    @property
    def gpu_bytes(self) -> int:
        """Memory that an instance takes of each of its GPUs: its part of weights and KV cache, and a tenth on top for activations."""
        return _part(int((self.weight_bytes + self.kv_cache_bytes) * 1.1), self.tensor_parallel)

    @property
    def cpu_bytes(self) -> int:
        """Memory that an instance needs of each of its CPU slots: vLLM repacks a second copy of the weights.

        Source of the process's own share: measured, SmolLM2-135M under vLLM 0.32 (1.4 GB private in all).
        """
        return _part(2 * self.weight_bytes + self.kv_cache_bytes, self.tensor_parallel) + _CPU_PROCESS_BYTES

    def bytes_on(self, device: Device) -> int:
        """What an instance takes of `device`; more than the device has if it cannot run there.

        A CPU slot is taken whole: its cores are one instance's threads, and would be shared by several.
        """
        if device.kind is DeviceKind.CPU:
            return max(self.cpu_bytes, device.memory_bytes)
        return self.gpu_bytes


_CPU_PROCESS_BYTES = 640 * 1024 * 1024


def _part(total_bytes: int, ranks: int) -> int:
    """What each of `ranks` has of it, rounded up."""
    return -(-total_bytes // max(1, ranks))


class Device(Contract, frozen=True):
    """One place where instances run: a GPU, or a CPU slot (a share of the node's cores and memory)."""

    index: int
    kind: DeviceKind
    name: str
    memory_bytes: int


class StartPhases(Contract, frozen=True):
    """Where an instance's start went, in milliseconds; consecutive, so they add up to `start_ms`."""

    fork_ms: float = 0.0  # start command received → child running
    lease_ms: float = 0.0  # waiting for the storage agent to have the files
    load_ms: float = 0.0  # reading weights into the engine
    engine_ms: float = 0.0  # everything else of the engine's construction
    announce_ms: float = 0.0  # engine ready → state reported

    @property
    def start_ms(self) -> float:
        return self.fork_ms + self.lease_ms + self.load_ms + self.engine_ms + self.announce_ms

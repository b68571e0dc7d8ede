"""What the gateway's admin API answers, as far as the command line reads it. Unknown fields are ignored."""

from __future__ import annotations

import msgspec

from stoker_contracts.decisions import DecisionRecord


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ModelInstance(Answer, frozen=True):
    instance_id: str
    node: str
    state: str


class ModelTier(Answer, frozen=True):
    node: str
    tier: str
    held_bytes: int
    total_bytes: int


class Model(Answer, frozen=True):
    name: str
    model_id: str
    source: str
    architecture: str
    dtype: str
    weight_bytes: int
    max_model_len: int  # tokens
    kv_cache_bytes: int
    slots: int
    engine: str
    keep_alive_s: float
    instances: list[ModelInstance] = []
    tiers: list[ModelTier] = []


class Models(Answer, frozen=True):
    models: list[Model]


class Phases(Answer, frozen=True):
    """Milliseconds."""

    fork_ms: float = 0.0
    lease_ms: float = 0.0
    load_ms: float = 0.0
    engine_ms: float = 0.0
    announce_ms: float = 0.0


class Instance(Answer, frozen=True):
    instance_id: str
    model: str
    node: str
    state: str
    devices: list[int] = []
    room: int = 0
    running: int = 0
    idle_ms: int = 0
    age_ms: int = 0
    phases: Phases = Phases()
    load_source: str = ""
    load_origin: str = ""
    failure: str = ""
    engine: str = ""


class Instances(Answer, frozen=True):
    instances: list[Instance]


class NodeDevice(Answer, frozen=True):
    index: int
    kind: str
    name: str
    memory_bytes: int


class NodeTier(Answer, frozen=True):
    tier: str
    capacity_bytes: int
    used_bytes: int
    read_bytes_per_s: float = 0.0


class NodeLink(Answer, frozen=True):
    peer: str
    read_bytes_per_s: float = 0.0
    read_bytes: int = 0


class Node(Answer, frozen=True):
    node: str
    boot_id: str = ""
    devices: list[NodeDevice] = []
    zygote_ready: bool = False
    draining: bool = False
    tiers: list[NodeTier] = []
    links: list[NodeLink] = []
    prepared: list[str] = []


class Nodes(Answer, frozen=True):
    nodes: list[Node]


class Prefetched(Answer, frozen=True):
    """Answer to a prefetch. nodes: empty: all live ones."""

    model: str
    nodes: list[str] = []
    tier: str = ""
    cancel: bool = False


class InstanceLeft(Answer, frozen=True):
    instance_id: str
    running: int = 0


class Draining(Answer, frozen=True):
    """How far a node is from being empty. live: its worker was heard lately; instances: those it says it has."""

    node: str
    draining: bool
    drained: bool
    live: bool = True
    instances: list[InstanceLeft] = []


class Decision(DecisionRecord, frozen=True):
    """model: its name."""

    model: str = ""


class Decisions(Answer, frozen=True):
    decisions: list[Decision]


class Deployed(Answer, frozen=True):
    """Answer to a registration. created: False if the same model was registered already."""

    model: Model
    created: bool = True

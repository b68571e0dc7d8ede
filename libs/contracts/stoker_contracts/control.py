"""Control messages: JSON, idempotent, durations and never wall-clock times."""

from __future__ import annotations

from typing import ClassVar

from stoker_contracts.codec import LIMIT_BYTES_MAX, Contract
from stoker_contracts.models import Device, InstanceState, ModelOptions, ModelSpec, StartPhases, Tier


class Demand(Contract, frozen=True):
    """Gateway → leader, on `scheduler.demand`: what this gateway wants, as absolute values.

    Repeated every 500 ms with jitter while the queue is non-empty; valid for 2 s. Retry-safe.
    """

    gateway_id: str
    model_id: str
    queued: int
    oldest_wait_ms: int


DEMAND_INTERVAL_S = 0.5
DEMAND_VALID_S = 2.0


class StartInstance(Contract, frozen=True):
    """Leader → worker, on `worker.<node>.start`; answered Done or Failed. Retry-safe: instance ids are never reused."""

    instance_id: str
    boot_id: str  # of the worker meant; another one answers wrong_boot
    term: int  # the leader's; lower than the highest seen is answered stale_term
    model: ModelSpec
    devices: tuple[int, ...]
    budget_ms: int  # time left for the start when sent


class StopInstance(Contract, frozen=True):
    """Leader → worker, on `worker.<node>.stop`; answered Done or Failed. Retry-safe: stopping a stopped one is Done."""

    instance_id: str
    boot_id: str
    term: int
    only_if_idle: bool = False  # answered `busy` if a request is in hand
    reason: str = ""


class PrepareModel(Contract, frozen=True):
    """Leader → worker, on `worker.<node>.prepare`; answered Done at once, worked on in the background. Retry-safe.

    Pays what the first start of an architecture costs (vLLM inspects the class in a process of its own).
    """

    boot_id: str
    term: int
    model: ModelSpec


class DrainNode(Contract, frozen=True):
    """Leader → worker, on `worker.<node>.drain`; answered Done or Failed. Retry-safe: it says how the node shall be.

    A draining worker refuses starts. What runs goes on until it is told to stop.
    """

    boot_id: str
    term: int
    draining: bool  # False: take starts again


class AnnounceTerm(Contract, frozen=True):
    """New leader → worker, on `worker.<node>.term`; answered WorkerStatus or Failed. Retry-safe.

    Nothing is placed on a node before it has answered the leader's term with its actual state.
    """

    term: int
    leader_id: str


class Done(Contract, frozen=True, tag="done"):
    """The command was carried out, or had been already."""


class Failed(Contract, frozen=True, tag="failed"):
    """The command was refused. code: of a StokerError, or wrong_boot | busy."""

    code: str
    message: str
    retryable: bool = False


CommandReply = Done | Failed


class InstanceStatus(Contract, frozen=True):
    """One instance of a worker. Counters only grow; rates are the reader's business."""

    instance_id: str
    model_id: str
    model: str
    state: InstanceState
    devices: tuple[int, ...]
    room: int = 0  # further requests it would admit now
    running: int = 0
    arrivals: int = 0  # requests admitted since start
    finishes: int = 0
    idle_ms: int = 0  # since the last request ended, or since ready; 0 while busy
    age_ms: int = 0  # since the start command
    pid: int = 0
    phases: StartPhases = StartPhases()
    load_source: Tier = Tier.UNKNOWN  # the tier that the weights came from
    failure: str = ""  # why, when state is failed
    engine: str = ""
    load_origin: str = ""  # of remote and peer: the kind of source (file, s3), or the peer's node


class WorkerStatus(Contract, frozen=True, tag="worker_status"):
    """Worker → leader and gateways, on `status.worker.<node>`: every second and at once on a change. Retry-safe.

    A full list: an instance that is not in it does not exist on this boot. Ended instances are listed for 10 s.
    """

    LIMIT_BYTES: ClassVar[int] = LIMIT_BYTES_MAX

    node: str
    boot_id: str
    seq: int  # grows by one a message, per boot
    term: int  # the highest seen
    devices: tuple[Device, ...]
    instances: tuple[InstanceStatus, ...] = ()
    prepared: tuple[str, ...] = ()  # architectures whose first start is paid
    zygote_ready: bool = False
    draining: bool = False
    protocol: int = 0  # the sender's PROTOCOL_MINOR; a default is not sent, so this one stays 0 for ever
    leaving: bool = False  # its process ends: then it drains whatever it was told


TermReply = WorkerStatus | Failed


class TierStatus(Contract, frozen=True):
    """One tier of a node. Bandwidth is what loads observed (a robust average), 0 while unknown."""

    tier: Tier
    capacity_bytes: int
    used_bytes: int
    hits: int = 0
    misses: int = 0
    queue: int = 0
    read_bytes_per_s: float = 0.0


class LinkStatus(Contract, frozen=True):
    """What a storage agent has seen of its way to one peer: a robust average, 0 while unknown."""

    peer: str  # node
    read_bytes_per_s: float
    read_bytes: int = 0  # since boot; only grows


class HeldModel(Contract, frozen=True):
    """How much of a model a node's tier holds; less than all of it while it arrives, or after part of it was lost."""

    model_id: str
    tier: Tier
    held_bytes: int
    total_bytes: int
    leases: int = 0


class StoreStatus(Contract, frozen=True):
    """Storage agent → leader and gateways, on `status.store.<node>`, every second and at once on a change. Retry-safe."""

    LIMIT_BYTES: ClassVar[int] = LIMIT_BYTES_MAX

    node: str
    boot_id: str
    seq: int
    tiers: tuple[TierStatus, ...]
    held: tuple[HeldModel, ...] = ()
    protocol: int = 0  # the sender's PROTOCOL_MINOR; a default is not sent, so this one stays 0 for ever
    address: str = ""  # host:port where peers get chunks; empty: it serves none
    links: tuple[LinkStatus, ...] = ()


class RegisterModel(Contract, frozen=True):
    """Gateway → storage agent, on `store.<node>.register`; answered Registered or Failed.

    Retry-safe: the same name with the same contents is answered with the registration that exists.
    """

    name: str
    source: str  # file:///absolute/directory on that node, or s3://bucket/prefix
    options: ModelOptions = ModelOptions()


class Registered(Contract, frozen=True, tag="registered"):
    model: ModelSpec
    created: bool  # False: it was registered already
    files: int
    total_bytes: int


RegisterReply = Registered | Failed


class WantPrefetch(Contract, frozen=True):
    """Gateway → leader, on `scheduler.prefetch`: bring a model to nodes. Answered Done once ordered, or Failed. Retry-safe."""

    model_id: str
    nodes: tuple[str, ...] = ()  # empty: all that are live
    tier: Tier = Tier.DRAM  # ssd | dram
    priority: int = 0  # higher first
    budget_ms: int = 0  # for it to begin; 0: no limit
    cancel: bool = False  # give up instead what was wanted before


class WantDrain(Contract, frozen=True):
    """Gateway → leader, on `scheduler.drain`. Answered Done once it is stored, or Failed. Retry-safe.

    Nothing new is placed on the node, and what runs there ends once it is idle; until it is undone, also by later leaders
    and for later boots of the node.
    """

    node: str
    undo: bool = False


class PrefetchModel(Contract, frozen=True):
    """Leader → storage agent, on `store.<node>.prefetch`; answered Done once queued, or Failed.

    Retry-safe: an order takes the place of an earlier one for the same model.
    """

    model_id: str
    tier: Tier  # ssd | dram
    term: int  # the leader's; lower than the highest seen is answered stale_term
    priority: int = 0  # higher first, then the earlier deadline; a start goes before all
    budget_ms: int = 0  # time left for it to begin when sent; 0: no limit
    sources: tuple[str, ...] = ()  # nodes to take it from, best first; empty: whom the agent finds


class CancelPrefetch(Contract, frozen=True):
    """Leader → storage agent, on `store.<node>.cancel`; answered Done or Failed. Retry-safe: what is not queued is Done."""

    model_id: str
    term: int


class EvictModel(Contract, frozen=True):
    """Leader → storage agent, on `store.<node>.evict`; answered Done or Failed (`busy` while leased). Retry-safe."""

    model_id: str
    tier: Tier  # ssd | dram
    term: int


class Locate(Contract, frozen=True):
    """Storage agent → storage agent, on `store.<node>.locate`; answered Located or Failed. Retry-safe."""

    model_id: str
    node: str  # who asks


class Located(Contract, frozen=True, tag="located"):
    """What a node could give of a model now. Chunks come in the order of the files, so held_bytes of them are the first."""

    node: str
    address: str  # host:port; empty: it serves none
    held_bytes: int  # in either tier
    total_bytes: int
    receiving: bool = False  # more is on its way
    upstream: tuple[str, ...] = ()  # nodes that it receives from, and those they do, nearest first
    serving: int = 0  # transfers to peers in hand, of all models


LocateReply = Located | Failed

STATUS_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 3.0
ENDED_LISTED_S = 10.0

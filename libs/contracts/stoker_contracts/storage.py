"""Between an instance and its node's storage agent, on a Unix socket: JSON, one message a line.

    instance: LeaseRequest
    agent:    LeaseProgress …, then LeaseGranted or LeaseRefused
    instance: LeaseUsed (once the engine has its own copy), then closes

With LeaseGranted, in the same sendmsg and by SCM_RIGHTS, come two descriptors: the node's pool of memory (read-only) and
the board of this load, which says which of its chunks hold the model and which of them are ready. The agent may still be
bringing the rest: the board also says how that ends. Source: `stoker_checkpoint.load.attach`.
Where `ring` says so two more follow, for one consumer, who then leaves the others alone: a ring in the memory of the device
that was asked for, into which the agent copies what is ready, and that ring's board. Source:
`stoker_checkpoint.device_ring.attach_ring`.

The connection is the lease: files and chunks stay where they are while it is open, and a process that dies
gives it up by dying.
"""

from __future__ import annotations

from stoker_contracts.codec import Contract
from stoker_contracts.models import Tier


class LeaseRequest(Contract, frozen=True):
    model_id: str
    instance_id: str
    device: str = ""  # a GPU that the weights are for, by NVML's UUID ("GPU-…"), if one process alone takes them


class LeaseProgress(Contract, frozen=True, tag="progress"):
    """Sent at most ten times a second while the agent fetches."""

    done_bytes: int
    total_bytes: int


class LeaseGranted(Contract, frozen=True, tag="granted"):
    path: str  # the model's folder on this node: its small files, and the manifest of its weights
    source: Tier  # where the weights were when the lease was asked for; dram: in the pool, or on their way there
    total_bytes: int
    wait_ms: float  # from request to grant
    ring: bool = False  # False also where a device was asked for, and the agent can get no ring there
    origin: str = ""  # of remote and peer: the kind of source (file, s3), or the peer's node


class LeaseRefused(Contract, frozen=True, tag="refused"):
    code: str  # of a StokerError
    message: str
    retryable: bool = False


class LeaseUsed(Contract, frozen=True):
    """Instance → agent: the weights are in the engine. For the agent's load observations."""

    load_ms: float
    read_bytes: int


LeaseReply = LeaseProgress | LeaseGranted | LeaseRefused
LINE_LIMIT_BYTES = 64 * 1024

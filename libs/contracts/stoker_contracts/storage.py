"""Between an instance and its node's storage agent, on a Unix socket: JSON, one message a line.

    instance: LeaseRequest
    agent:    LeaseProgress …, then LeaseGranted or LeaseRefused
    instance: LeaseUsed (once the engine has its own copy), then closes

The connection is the lease: the files stay where they are while it is open, and a process that dies
gives it up by dying.
"""

from __future__ import annotations

from stoker_contracts.codec import Contract
from stoker_contracts.models import Tier


class LeaseRequest(Contract, frozen=True):
    model_id: str
    instance_id: str


class LeaseProgress(Contract, frozen=True, tag="progress"):
    """Sent at most ten times a second while the agent fetches."""

    done_bytes: int
    total_bytes: int


class LeaseGranted(Contract, frozen=True, tag="granted"):
    path: str  # a Hugging Face directory on this node
    source: Tier  # where the files were when the lease was asked for
    total_bytes: int
    wait_ms: float  # from request to grant


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

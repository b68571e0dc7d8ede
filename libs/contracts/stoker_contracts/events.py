"""Events for people and their tools: CloudEvents 1.0, JSON format. No service depends on them."""

from __future__ import annotations

from typing import Any, ClassVar

from stoker_contracts.codec import Contract


class CloudEvent(Contract, frozen=True):
    """One event, on `events.<area>.<what>` in the stream STOKER_EVENTS.

    source: `/stoker/<service>/<name>`. Ordered per (source, bootid, sequence); a gap in `sequence` says
    that events were lost. `bootid`, `sequence` and `traceparent` are CloudEvents extension attributes.
    Source: CloudEvents 1.0.2, JSON event format and the Sequence and Distributed Tracing extensions.
    """

    LIMIT_BYTES: ClassVar[int] = 64 * 1024

    id: str
    source: str
    type: str  # stoker.<area>.<what>
    time: str  # RFC 3339, UTC
    subject: str  # what it is about: a model, node or instance
    bootid: str
    sequence: str  # zero-padded decimal, so that it also sorts as text
    data: dict[str, Any]
    specversion: str  # 1.0
    datacontenttype: str  # application/json
    traceparent: str = ""  # left out where there is no trace: CloudEvents know no empty attributes


MODEL_REGISTERED = ("model", "registered")
MODEL_DELETED = ("model", "deleted")
MODEL_DECIDED = ("model", "decided")
NODE_JOINED = ("node", "joined")
NODE_LEFT = ("node", "left")
NODE_SILENT = ("node", "silent")
NODE_QUARANTINED = ("node", "quarantined")
NODE_DRAINING = ("node", "draining")
NODE_DRAINED = ("node", "drained")
NODE_UNDRAINED = ("node", "undrained")
INSTANCE_PLACED = ("instance", "placed")
INSTANCE_STARTING = ("instance", "starting")
INSTANCE_READY = ("instance", "ready")
INSTANCE_MEASURED = ("instance", "measured")
INSTANCE_STOPPING = ("instance", "stopping")
INSTANCE_STOPPED = ("instance", "stopped")
INSTANCE_FAILED = ("instance", "failed")
TIER_FILLING = ("tier", "filling")
TIER_FILLED = ("tier", "filled")
TIER_EVICTED = ("tier", "evicted")
TIER_REFUSED = ("tier", "refused")
TIER_DAMAGED = ("tier", "damaged")
TIER_PEER_SUSPECTED = ("tier", "peer_suspected")
TIER_PREFETCH_QUEUED = ("tier", "prefetch.queued")
TIER_PREFETCH_STARTED = ("tier", "prefetch.started")
TIER_PREFETCH_PROGRESS = ("tier", "prefetch.progress")
TIER_PREFETCH_DONE = ("tier", "prefetch.done")
TIER_PREFETCH_CANCELLED = ("tier", "prefetch.cancelled")
TIER_PREFETCH_FAILED = ("tier", "prefetch.failed")

"""Every NATS subject, here and nowhere else. Node, instance and gateway names are single subject tokens."""

from __future__ import annotations

PREFIX = "stoker.v1"


def instance_generate(node: str, instance_id: str) -> str:
    return f"{PREFIX}.instance.{node}.{instance_id}.generate"


def instance_ack(node: str, instance_id: str) -> str:
    return f"{PREFIX}.instance.{node}.{instance_id}.ack"


def instance_cancel(node: str, instance_id: str) -> str:
    return f"{PREFIX}.instance.{node}.{instance_id}.cancel"


def gateway_frames(gateway_id: str) -> str:
    return f"{PREFIX}.gateway.{gateway_id}.frames"


SCHEDULER_DEMAND = f"{PREFIX}.scheduler.demand"
SCHEDULER_PREFETCH = f"{PREFIX}.scheduler.prefetch"
SCHEDULER_DRAIN = f"{PREFIX}.scheduler.drain"


def worker_start(node: str) -> str:
    return f"{PREFIX}.worker.{node}.start"


def worker_stop(node: str) -> str:
    return f"{PREFIX}.worker.{node}.stop"


def worker_prepare(node: str) -> str:
    return f"{PREFIX}.worker.{node}.prepare"


def worker_drain(node: str) -> str:
    return f"{PREFIX}.worker.{node}.drain"


def worker_term(node: str) -> str:
    return f"{PREFIX}.worker.{node}.term"


def store_register(node: str) -> str:
    return f"{PREFIX}.store.{node}.register"


def store_prefetch(node: str) -> str:
    return f"{PREFIX}.store.{node}.prefetch"


def store_cancel(node: str) -> str:
    return f"{PREFIX}.store.{node}.cancel"


def store_evict(node: str) -> str:
    return f"{PREFIX}.store.{node}.evict"


def store_locate(node: str) -> str:
    return f"{PREFIX}.store.{node}.locate"


def status_worker(node: str) -> str:
    return f"{PREFIX}.status.worker.{node}"


def status_store(node: str) -> str:
    return f"{PREFIX}.status.store.{node}"


STATUS_WORKER_ALL = f"{PREFIX}.status.worker.*"
STATUS_STORE_ALL = f"{PREFIX}.status.store.*"

EVENTS_STREAM = "STOKER_EVENTS"
EVENTS_ALL = f"{PREFIX}.events.>"


def event(area: str, what: str) -> str:
    """area: model | node | instance | tier.  what: lower-case words joined by '_' or '.'."""
    return f"{PREFIX}.events.{area}.{what}"

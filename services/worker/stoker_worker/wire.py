"""Messages inside a worker: worker ↔ zygote and worker ↔ instance, on SOCK_SEQPACKET pairs (one packet each).

An instance's pair is made by the worker and passed through the zygote to the child. Its end-of-file is
the sign, on either side, that the other process is gone.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stoker_contracts.codec import Contract
from stoker_contracts.models import DeviceKind, ModelSpec, StartPhases, Tier
from stoker_core.errors import InvalidMessage

PACKET_BYTES_MAX = 128 * 1024


class InstanceConfig(Contract, frozen=True):
    """All that a forked instance is told. started_at_s: when the start command came, on this machine's monotonic clock."""

    instance_id: str
    node: str
    model: ModelSpec
    device_kind: DeviceKind
    devices: tuple[int, ...]
    device_bytes: int
    nats_url: str
    store_socket: Path
    threads: int
    batched_tokens_max: int
    sim_step_s: float
    lease_timeout_s: float
    drain_s: float
    started_at_s: float
    log_level: str
    log_format: str


class Fork(Contract, frozen=True, tag="fork"):
    """Worker → zygote, with the instance's end of its pair as file descriptor."""

    config: InstanceConfig


class Prepare(Contract, frozen=True, tag="prepare"):
    """Worker → zygote: have vLLM inspect this architecture, then import its module, so that no start pays for it."""

    architecture: str


class ZygoteReady(Contract, frozen=True, tag="ready"):
    import_ms: float


class Forked(Contract, frozen=True, tag="forked"):
    instance_id: str
    pid: int


class Prepared(Contract, frozen=True, tag="prepared"):
    """failure: why vLLM cannot run this architecture, or ''."""

    architecture: str
    failure: str = ""


class ForkRefused(Contract, frozen=True, tag="fork_refused"):
    instance_id: str
    reason: str


class ChildExited(Contract, frozen=True, tag="exited"):
    """status: as of waitpid(2), decoded: the exit code, or minus the signal's number."""

    instance_id: str
    status: int


ToZygote = Fork | Prepare
FromZygote = ZygoteReady | Forked | ForkRefused | ChildExited | Prepared


class Stop(Contract, frozen=True, tag="stop"):
    """Worker → instance: finish what is in hand, then exit; answered Stopping or Busy."""

    only_if_idle: bool = False


class Stopping(Contract, frozen=True, tag="stopping"):
    pass


class Busy(Contract, frozen=True, tag="busy"):
    pass


class EngineReady(Contract, frozen=True, tag="engine_ready"):
    """Instance → worker. ready_at_s: on this machine's monotonic clock; announce_ms is the worker's to fill."""

    phases: StartPhases
    load_source: Tier
    ready_at_s: float
    load_origin: str = ""


class Load(Contract, frozen=True, tag="load"):
    """Instance → worker, on a change and at least every second."""

    room: int
    running: int
    arrivals: int
    finishes: int
    idle_ms: int


class Broken(Contract, frozen=True, tag="broken"):
    """Instance → worker: it cannot go on, and exits."""

    code: str
    message: str


FromInstance = Stopping | Busy | EngineReady | Load | Broken

T = TypeVar("T")


def _path_out(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def _path_in(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


def pack(message: Contract) -> bytes:
    return msgspec.json.encode(message, enc_hook=_path_out)


def unpack(kind: Any, packet: bytes) -> Any:
    """Raises InvalidMessage."""
    try:
        return msgspec.json.decode(packet, type=kind, dec_hook=_path_in)
    except msgspec.DecodeError as error:
        raise InvalidMessage(str(error)) from error


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair that keeps packet boundaries; both ends close on exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

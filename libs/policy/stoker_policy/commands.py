"""What a decision orders. `reason` is for people: logs, events, the instance's row."""

from __future__ import annotations

import msgspec


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Start an instance of a model on devices of a node."""

    model_id: str
    node: str
    devices: tuple[int, ...]
    reason: str


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """Stop an instance. only_if_idle: the worker refuses if a request came meanwhile."""

    instance_id: str
    reason: str
    only_if_idle: bool


class Prepare(msgspec.Struct, frozen=True, kw_only=True):
    """Have a node pay what the first start of an architecture costs. model_id: any model of that architecture."""

    node: str
    model_id: str
    architecture: str


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A demanded model fits on no device of the cluster, were it empty."""

    model_id: str
    reason: str


Command = Start | Stop | Prepare | Reject

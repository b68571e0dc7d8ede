"""What a decision orders, and what it weighed. `reason` is for people: logs, events, the instance's row."""

from __future__ import annotations

from typing import Literal

from stoker_contracts.models import Tier
from stoker_policy.facts import LoadView, View
from stoker_policy.startup import Startup

How = Literal["free", "wait", "stop", "migrate"]
"""How the devices come to have room: they have it; they will, as somebody there is about to end; idle instances are stopped;
running ones are moved away."""


class Option(View, frozen=True):
    """One way to serve a model, as it was weighed.

    source, origin: where its weights would come from, the slowest tier of them; of remote the kind of source, of peer its node.
    displaced: instances that it stops or moves.
    """

    node: str
    devices: tuple[int, ...]
    source: Tier
    origin: str
    how: How
    startup: Startup
    displaced: int = 0


class Start(View, frozen=True):
    """Start an instance of a model on devices of a node.

    option: its prediction.  sources: peers to take weights from, best first.  load: what it brings, for its reservation.
    """

    model_id: str
    node: str
    devices: tuple[int, ...]
    reason: str
    option: Option
    load: LoadView
    sources: tuple[str, ...] = ()


class Stop(View, frozen=True):
    """Stop an instance. only_if_idle: the worker refuses if a request came meanwhile."""

    instance_id: str
    reason: str
    only_if_idle: bool


class Migrate(View, frozen=True):
    """Move what an instance has in hand elsewhere, then stop it.

    to_instance: a ready one of its model that takes it; '': one has to be started on these devices of that node first.
    """

    instance_id: str
    node: str
    devices: tuple[int, ...]
    reason: str
    to_instance: str = ""


class Prepare(View, frozen=True):
    """Have a node pay what the first start of an architecture costs. model_id: any model of that architecture."""

    node: str
    model_id: str
    architecture: str


class Reject(View, frozen=True):
    """A demanded model fits on no node of the cluster, were it empty."""

    model_id: str
    reason: str


Command = Start | Stop | Migrate | Prepare | Reject

OPTIONS_MAX = 8


class Decision(View, frozen=True):
    """How a model is to be served, and what else was weighed.

    options: best first, at most OPTIONS_MAX.  weighed: how many there were.  chosen: index into options; None: there is none.
    """

    model_id: str
    options: tuple[Option, ...]
    weighed: int
    chosen: int | None
    commands: tuple[Command, ...]
    reason: str

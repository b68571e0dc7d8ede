"""What a policy may have done, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from stoker_contracts.models import Tier

if TYPE_CHECKING:
    from stoker_policy.facts import LoadView
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.shelves import Eviction
    from stoker_sim.cluster.world import World


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """Start an instance. evicts: those that have to go from these devices first; what they have in hand waits again.

    givers: nodes to take weights from, best first, instead of the model's own store.
    load: what it was expected to bring, for the policy that said so.
    """

    line: Line
    node: str
    devices: tuple[int, ...]
    evicts: tuple[Instance, ...] = ()
    givers: tuple[str, ...] = ()
    load: LoadView | None = None


class End(msgspec.Struct, frozen=True, kw_only=True):
    """Stop an instance once it has nothing in hand. only_if_idle: not at all, if it has something now."""

    instance: Instance
    only_if_idle: bool = True


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Move what an instance has in hand to another one, or one that is started there first, and stop it.

    then: the model that starts on its devices afterwards.
    """

    instance: Instance
    to: Instance | None = None
    node: str = ""
    devices: tuple[int, ...] = ()
    then: Line | None = None


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """Bring a model into a node's memory ahead of any start, from the nearest place; starts go before it on every link."""

    line: Line
    node: str
    givers: tuple[str, ...] = ()


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """A model fits nowhere: its requests fail."""

    line: Line


Order = Begin | End | Move | Fetch | Refuse


class Policy(Protocol):
    """Decides; whatever else it needs to know it is told as it happens.

    tiers, eviction: where its system keeps models on a node, and how it chooses what goes.  preloaded: whether SSDs hold the
    models at the beginning.
    """

    name: ClassVar[str]
    tiers: ClassVar[frozenset[Tier]]
    eviction: ClassVar[Eviction]
    preloaded: ClassVar[bool]

    def decide(self, world: World) -> Iterator[Order]:
        """Orders, each carried out before the next is asked for. Asked whenever demand or room changed, and every tick_s."""
        ...

    def held(self, node: str, name: str, in_dram: bool, on_ssd: bool) -> None: ...
    def changed(self, instance: Instance) -> None: ...
    def gone(self, instance: Instance) -> None: ...
    def asked(self, line: Line) -> None: ...
    def came_back(self, line: Line, idle_s: float) -> None: ...
    def ready(self, instance: Instance) -> None: ...
    def moved(self, node: str, tokens: int, seconds: float) -> None: ...
    def finished(self, line: Line, tokens: int) -> None: ...


class Deaf:
    """A policy that looks at the world when it decides, and needs no news."""

    def held(self, node: str, name: str, in_dram: bool, on_ssd: bool) -> None: ...
    def changed(self, instance: Instance) -> None: ...
    def gone(self, instance: Instance) -> None: ...
    def asked(self, line: Line) -> None: ...
    def came_back(self, line: Line, idle_s: float) -> None: ...
    def ready(self, instance: Instance) -> None: ...
    def moved(self, node: str, tokens: int, seconds: float) -> None: ...
    def finished(self, line: Line, tokens: int) -> None: ...

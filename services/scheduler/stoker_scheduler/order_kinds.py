"""What can be ordered: a decision with all that carrying it out needs."""

from __future__ import annotations

from dataclasses import dataclass

from stoker_contracts.control import WantPrefetch
from stoker_contracts.models import ModelSpec
from stoker_db.ports import InstanceRow


@dataclass(frozen=True)
class StartOrder:
    """row: as it shall be desired.  decided_s, demanded_s: when it was decided, and since when it is wanted."""

    row: InstanceRow
    model: ModelSpec
    decided_s: float
    demanded_s: float


@dataclass(frozen=True)
class StopOrder:
    row: InstanceRow
    only_if_idle: bool


@dataclass(frozen=True)
class PrepareOrder:
    node: str
    boot_id: str
    model: ModelSpec


@dataclass(frozen=True)
class PrefetchOrder:
    """For a node's storage agent. sources: whom to take the model from, best first.  ordered_s: when it was decided."""

    node: str
    want: WantPrefetch
    sources: tuple[str, ...]
    ordered_s: float

    @property
    def key(self) -> tuple[str, str]:
        return (self.node, self.want.model_id)


@dataclass(frozen=True)
class DrainOrder:
    """Have a node's worker refuse starts, or take them again."""

    node: str
    boot_id: str
    draining: bool

    @property
    def key(self) -> str:
        """One at a time for a node; no instance id has a space."""
        return f"drain {self.node}"


Order = StartOrder | StopOrder | PrepareOrder | PrefetchOrder | DrainOrder

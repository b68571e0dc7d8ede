"""A node without a cluster token: it takes nothing from peers."""

from __future__ import annotations

from collections.abc import Sequence

from stoker_contracts.control import LinkStatus, Located
from stoker_core.errors import PeerFailed
from stoker_storeagent.ports import OnBytes


class NoPeers:
    """Implements ports.Peers."""

    async def locate(self, model_id: str, wanted: Sequence[str] = ()) -> list[Located]:
        return []

    async def read(
        self, located: Located, model_id: str, position: int, offset: int, into: memoryview, on_bytes: OnBytes
    ) -> str:
        raise PeerFailed(located.node, "this node has no cluster token")

    def links(self) -> tuple[LinkStatus, ...]:
        return ()

    def suspect(self, node: str, reason: str) -> None:
        """There is none to suspect."""

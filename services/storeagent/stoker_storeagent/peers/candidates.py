"""Whom to ask for a model, by what nodes say of themselves. No I/O."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from stoker_contracts.control import SILENCE_LIMIT_S, StoreStatus
from stoker_core.clock import Clock

NODES_MAX = 4096


@dataclass(frozen=True)
class _Heard:
    boot_id: str
    seq: int
    at_s: float
    serves: bool
    held: dict[str, int]  # model → bytes in the tier that has most of it


class Heard:
    """The newest status of every node that spoke within SILENCE_LIMIT_S."""

    def __init__(self, clock: Clock, *, node: str) -> None:
        self._clock, self._node = clock, node
        self._heard: dict[str, _Heard] = {}

    def offer(self, status: StoreStatus) -> None:
        before = self._heard.get(status.node)
        if before is not None and before.boot_id == status.boot_id and before.seq >= status.seq:
            return
        held: dict[str, int] = {}
        for model in status.held:
            held[model.model_id] = max(model.held_bytes, held.get(model.model_id, 0))
        if before is None and len(self._heard) >= NODES_MAX:
            del self._heard[min(self._heard, key=lambda node: self._heard[node].at_s)]
        self._heard[status.node] = _Heard(
            status.boot_id, status.seq, self._clock.monotonic_s(), bool(status.address), held
        )

    def candidates(self, model_id: str, placed: Iterable[str]) -> list[str]:
        """Nodes to ask, the most promising first: those that say they have most of it, then those of `placed`.

        Among equals each node has its own order, so that not all ask the same few.
        """
        since_s = self._clock.monotonic_s() - SILENCE_LIMIT_S
        here = {node: heard for node, heard in self._heard.items() if heard.at_s >= since_s}
        holding = {
            node: heard.held[model_id] for node, heard in here.items() if heard.serves and model_id in heard.held
        }
        # Also those that were heard: a status has room for so many models only.
        others = {node: -1 for node in placed if node not in here or here[node].serves}
        asked = (others | holding).items()
        ordered = sorted(asked, key=lambda item: (-item[1], zlib.crc32(f"{self._node} {item[0]}".encode()), item[0]))
        return [node for node, _ in ordered if node != self._node]

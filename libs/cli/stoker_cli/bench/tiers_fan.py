"""Fan-out in `stoker bench tiers`: one node's model into the DRAM of several, over links of equal width."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_cli.bench.make_checkpoint import Checkpoint
from stoker_cli.bench.tiers_figures import Round
from stoker_cli.bench.tiers_system import Cluster, Node
from stoker_contracts.models import Tier
from stoker_policy import plan_fanout

HOLDER = "fan-0"
RECEIVERS = ("fan-1", "fan-2", "fan-3", "fan-4")
NO_SSD = 1
"""Byte of capacity: there is no room for any copy, as several nodes on one disk would measure that."""


class FanOut:
    """`prepare` first. names: of what is measured, `chain` or `star` and how many receive; fan1: one."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], cap_bytes_per_s: int) -> None:
        chunks = sum(-(-file.stat().st_size // CHUNK_BYTES) for file in checkpoint.files)
        settings = {
            "pool_bytes": max(2, chunks) * CHUNK_BYTES,
            "ssd_capacity_bytes": NO_SSD,
            "network_bytes_per_s": cap_bytes_per_s,
        }
        most = max(int(name[-1]) for name in names)
        self.nodes = [Node(name, settings) for name in (HOLDER, *RECEIVERS[:most])]
        self._total_bytes = checkpoint.total_bytes

    async def prepare(self, cluster: Cluster, url: str) -> None:
        self._cluster = cluster
        self._model_id = (await cluster.register(HOLDER, "fan", url)).model_id
        await cluster.bring(HOLDER, self._model_id, Tier.DRAM)

    async def measure(self, name: str) -> Round:
        """Seconds until the last receiver has all of it in DRAM, and the share of the bytes that came from whom it was meant."""
        cluster, receivers = self._cluster, RECEIVERS[: int(name[-1])]
        sources: dict[str, tuple[str, ...]] = dict.fromkeys(receivers, (HOLDER,))
        if name.startswith("chain"):
            sources = plan_fanout([HOLDER], receivers, {})
        for receiver in receivers:
            await cluster.evict(receiver, self._model_id, Tier.DRAM)
        before = {receiver: cluster.read_bytes(receiver) for receiver in receivers}
        began_s = time.perf_counter()
        await asyncio.gather(
            *(cluster.prefetch(receiver, self._model_id, Tier.DRAM, sources[receiver]) for receiver in receivers)
        )
        ends_s = [await cluster.whole(receiver, self._model_id, Tier.DRAM) for receiver in receivers]
        meant_bytes = sum(
            cluster.read_bytes(receiver).get(sources[receiver][0], 0) - before[receiver].get(sources[receiver][0], 0)
            for receiver in receivers
        )
        seconds = max(ends_s) - began_s
        return {f"{name}_s": seconds, f"{name}_as_planned": meant_bytes / (self._total_bytes * len(receivers))}

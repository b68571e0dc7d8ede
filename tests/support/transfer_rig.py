"""A transfer between simulated origins and a simulated disk; everything between them is real."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.support.origin_fakes import Giver, Peers, Source
from tests.support.storeagent_fakes import Disk, Filling, Told, digests, right
from tests.support.virtual_time import LoopClock

from stoker_checkpoint.digests import chunk_digest
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.origins import OriginFinder, Origins
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.shelving import Shelving
from stoker_storeagent.slots import Slots, Turn
from stoker_storeagent.targets import DiskTarget, PoolTarget
from stoker_storeagent.transfer import Transfer


async def digest_of(chunk: memoryview) -> str:
    return chunk_digest(chunk)


class Rig:
    """Of one model, on one node. Its disk lives on when another rig is made with it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Source | None = None,
        *,
        peers: dict[str, Giver] | None = None,
        disk: Disk | None = None,
        on_disk: Iterable[int] = (),
        capacity_bytes: int = 10**9,
        others: dict[str, dict[int, tuple[str, int]]] | None = None,
    ) -> None:
        """on_disk: positions that are there already.  others: further models on the disk: position → (digest, bytes)."""
        self.checkpoint, self.disk = checkpoint, disk or Disk()
        self.source, self.peers = source or Source(checkpoint), Peers(**(peers or {}))
        self.clock, self.told, self.slots = LoopClock(), Told(), Slots(4)
        self.ledger = Ledger(capacity_bytes, lambda model_id, size_bytes: float(size_bytes))
        self.on_disk = {position: digests(checkpoint)[position] for position in on_disk}
        held = {at: (digest, checkpoint.place(at)[2]) for at, digest in self.on_disk.items()}
        for model_id, chunks in {checkpoint.model_id: held, **(others or {})}.items():
            if chunks:
                self.ledger.adopt(model_id, checkpoint.weight_bytes, chunks, 0.0)
        for position, digest in self.on_disk.items():
            self.disk.chunks[digest] = right(checkpoint, position)
        self.filling: Filling | None = None
        self.transfer: Transfer | None = None
        self.found = 0

    async def evict(self, model_ids: Sequence[str], reason: str) -> None:
        for digest in [digest for model_id in model_ids for digest in self.ledger.evict(model_id)]:
            await self.disk.remove(digest)

    async def find(self) -> Origins:
        self.found += 1
        finder = OriginFinder("n0", lambda url: self.source, self.peers, self.clock, lambda: 1.0)
        return await finder.find(self.checkpoint)

    def shelving(self, *, required: bool = False) -> Shelving:
        return Shelving(self.checkpoint, self.ledger, self.disk, self.told, self.clock, self.evict, required=required)

    async def to_pool(self, *, window_chunks: int = 0, at_once: int = 3) -> None:
        self.filling = Filling(self.checkpoint, files=self.on_disk, window_chunks=window_chunks)
        await self._run(PoolTarget(self.filling, self.clock, window=bool(window_chunks)), at_once, required=False)

    async def to_disk(self, *, at_once: int = 3) -> None:
        await self._run(DiskTarget(self.checkpoint, at_once), at_once, required=True)

    async def _run(self, target: PoolTarget | DiskTarget, at_once: int, *, required: bool) -> None:
        missing = [position for position in range(self.checkpoint.positions) if position not in self.on_disk]
        shelving = self.shelving(required=required)
        try:
            await shelving.open(sum(self.checkpoint.place(position)[2] for position in missing))
            self.transfer = Transfer(
                self.checkpoint,
                target,
                shelving,
                self.find,
                digest_of,
                missing=missing,
                digests=dict(self.on_disk),
                slots=self.slots,
                turn=Turn(),
                at_once=at_once,
            )
            await self.transfer.run()
        finally:
            shelving.close()

    @property
    def right(self) -> dict[int, bytes]:
        return {position: right(self.checkpoint, position) for position in range(self.checkpoint.positions)}

    def check_pool(self) -> None:
        """Every position was published with its bytes, once."""
        assert self.filling is not None
        assert self.transfer is not None
        assert {**{at: right(self.checkpoint, at) for at in self.on_disk}, **self.filling.published} == self.right
        assert self.transfer.digests == dict(enumerate(digests(self.checkpoint)))
        assert self.transfer.arrived_bytes >= self.transfer.missing_bytes
        assert self.filling.failed == []

    def check_disk(self, *, whole: bool) -> None:
        """Nothing is open, nothing wrong has a name, and the ledger knows what is there."""
        assert self.disk.opened == set()
        assert all(chunk_digest(data) == digest for digest, data in self.disk.chunks.items())
        shelf = self.ledger.shelf(self.checkpoint.model_id)
        held = dict(shelf.digests) if shelf is not None else {}
        assert set(held.values()) <= self.disk.chunks.keys()
        assert self.ledger.used_bytes == sum(self.ledger.chunks.values())
        assert self.ledger.pins(self.checkpoint.model_id) == 0
        if whole:
            assert held == dict(enumerate(digests(self.checkpoint)))
            assert self.disk.parts == {}

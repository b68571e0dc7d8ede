"""What this node gives to its peers: chunks of the pool, of the disk, and those that are still on their way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.control import Located
from stoker_core.errors import NotHeld, StorageFailed
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.pool_tier import Load, PoolTier
from stoker_storeagent.ports import Disk, ServedChunk

HOLDER = "peer"


class Giving:
    """Implements ports.Served."""

    def __init__(self, pool: PoolTier, disk: Disk, ledger: Ledger, *, node: str) -> None:
        self._pool, self._disk, self._ledger, self._node = pool, disk, ledger, node
        self.address = ""  # host:port, once it is served there
        self.serving: Callable[[], int] = lambda: 0  # transfers to peers in hand

    def located(self, model_id: str) -> Located | None:
        load = self._load(model_id)
        held_bytes = max(self._ledger.held_bytes(model_id), self._pool.ready_bytes(load) if load is not None else 0)
        receiving = load is not None and not load.resident.complete
        if not held_bytes and not receiving:
            return None
        shelf = self._ledger.shelf(model_id)
        total_bytes = load.checkpoint.weight_bytes if load is not None else shelf.total_bytes if shelf else held_bytes
        origins = load.transfer.origins if load is not None and load.transfer is not None else None
        return Located(
            node=self._node,
            address=self.address,
            held_bytes=held_bytes,
            total_bytes=total_bytes,
            receiving=receiving,
            upstream=origins.upstream if receiving and origins is not None else (),
            serving=self.serving(),
        )

    @asynccontextmanager
    async def chunk(self, model_id: str, position: int, *, wait_s: float) -> AsyncIterator[ServedChunk]:
        load = self._load(model_id)
        if load is not None:
            if not 0 <= position < load.checkpoint.positions:
                raise NotHeld(f"{model_id} has no chunk {position}")
            self._pool.residents.share(load.resident, HOLDER)
            try:
                if await _ready(load, position, wait_s):
                    yield self._of_pool(load, position)
                    return
            finally:
                self._pool.residents.unshare(load.resident, HOLDER)
                await self._pool.let_go(load.resident)
        async with self._of_disk(model_id, position) as served:
            yield served

    def _load(self, model_id: str) -> Load | None:
        resident = self._pool.residents.find(model_id)
        return self._pool.loads[resident] if resident is not None else None

    def _of_pool(self, load: Load, position: int) -> ServedChunk:
        _, _, size_bytes = load.checkpoint.place(position)
        return ServedChunk(
            fd=load.filling.pool_fd,
            offset_bytes=load.filling.chunks[position] * CHUNK_BYTES,
            size_bytes=size_bytes,
            # Nobody told the digests of a load that an agent before this one began, while they are not bound.
            digest=load.digest(position) or chunk_digest(load.filling.buffer(position)),
        )

    @asynccontextmanager
    async def _of_disk(self, model_id: str, position: int) -> AsyncIterator[ServedChunk]:
        shelf = self._ledger.shelf(model_id)
        digest = shelf.digests.get(position, "") if shelf is not None else ""
        if not digest:
            raise NotHeld(f"chunk {position} of {model_id} is not here")
        size_bytes = self._ledger.chunks[digest]
        try:
            fd = await self._disk.open_chunk(digest)
        except StorageFailed as error:
            raise NotHeld(f"chunk {position} of {model_id} cannot be opened: {error.message}") from error
        try:
            yield ServedChunk(fd=fd, offset_bytes=0, size_bytes=size_bytes, digest=digest)
        finally:
            os.close(fd)


async def _ready(load: Load, position: int, wait_s: float) -> bool:
    if load.filling.is_ready(position):
        return True
    if wait_s <= 0:
        return False
    try:
        async with asyncio.timeout(wait_s):
            return await load.filling.ready(position)
    except TimeoutError:
        return False

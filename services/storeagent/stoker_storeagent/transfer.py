"""One model on its way: from the disk, from peers or from its source, into memory, and beside that onto the disk.

A position goes on by itself: it is fetched into its place in memory while its first bytes are being written to the disk
already, held against its digest, and published; whoever waits for it takes it from there, an instance or the next peer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from stoker_contracts.models import Tier
from stoker_core.errors import CorruptCheckpoint, StokerError, StorageFailed, TierFull
from stoker_storeagent.copying import Copy
from stoker_storeagent.origins import Origin, Origins
from stoker_storeagent.ports import Part
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.slots import Slots, Turn

Digest = Callable[[memoryview], Awaitable[str]]
"""The digest of a chunk."""


class Target(Protocol):
    """Where positions go. Source: targets.py."""

    copy_first: bool
    """Whether a position has to be on the disk before it is published: afterwards its place may be taken by another."""

    async def claim(self, position: int) -> memoryview:
        """The position's place, once it may be written to."""
        ...

    def publish(self, position: int) -> None: ...

    def done(self, position: int) -> None:
        """Nothing reads its place on our behalf any more."""
        ...

    def fail(self, position: int) -> None: ...

    async def next_failed(self) -> tuple[int, StokerError] | None:
        """As `ports.Filling.next_failed`."""
        ...


class Shelving(Protocol):
    """Where copies on the disk go; it takes none any more once that failed."""

    async def part(self, position: int) -> Part | None: ...

    async def arriving(self, position: int, digest: str) -> None:
        """It is about to have its digest's name on the disk: whatever happens next, a start will know whose it is."""
        ...

    async def arrived(self, position: int, digest: str) -> None: ...

    async def stray(self, digest: str) -> None:
        """A chunk may lie on the disk that did not arrive: nobody would find it there before the next start."""
        ...

    async def make_room(self) -> bool:
        """The disk is fuller than the tier: have something else removed. False: nothing may go."""
        ...

    def failed(self, error: StokerError) -> None:
        """Raises the error if the copy is all that was wanted."""
        ...

    async def damaged(self, position: int, error: StokerError) -> None:
        """A chunk on the disk cannot be read as it was written."""
        ...


class Transfer:
    """`run` once. digests: of every position, once it is published.  missing_bytes: of what is to be fetched.  arrived_bytes: of that."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Target,
        shelving: Shelving,
        find_origins: Callable[[], Awaitable[Origins]],
        digest: Digest,
        *,
        missing: Iterable[int],
        digests: dict[int, str],
        slots: Slots,
        turn: Turn,
        at_once: int,
    ) -> None:
        """missing: what is to be fetched.  digests: of the others, which the target has by itself."""
        self._checkpoint, self._target, self._shelving = checkpoint, target, shelving
        self._find_origins, self._digest = find_origins, digest
        self._origins: Origins | None = None
        self._missing = deque(missing)
        self.missing_bytes = sum(checkpoint.place(position)[2] for position in self._missing)
        self._slots, self._turn, self._at_once = slots, turn, at_once
        self._finding, self._making_room = asyncio.Lock(), asyncio.Lock()
        self._rooms = 0  # how often room was made
        self._partial: dict[int, int] = {}
        self._fetched_bytes = 0
        self.digests = digests

    @property
    def arrived_bytes(self) -> int:
        return self._fetched_bytes + sum(self._partial.values())

    @property
    def origins(self) -> Origins | None:
        return self._origins

    async def run(self) -> None:
        """Until every position is published, and what can be is on the disk.

        Raises the StokerError for which a position cannot be had; its consumers know by then.
        """
        try:
            async with asyncio.TaskGroup() as self._copies, asyncio.TaskGroup() as group:
                for _ in range(self._at_once):
                    group.create_task(self._fetch_damaged(), name="fetch damaged")
                    group.create_task(self._fetch_missing(), name="fetch")
        except BaseExceptionGroup as failures:
            raise first_of(failures) from failures

    async def _fetch_missing(self) -> None:
        while self._missing:
            await self._fetch(self._missing.popleft())

    async def _fetch_damaged(self) -> None:
        """Not behind what is missing: that may wait for a window which opens only once these have been used."""
        while (failed := await self._target.next_failed()) is not None:
            position, error = failed
            await self._shelving.damaged(position, error)
            await self._fetch(position)

    async def _fetch(self, position: int) -> None:
        place = await self._target.claim(position)
        try:
            digest, copy = await self._arrive(position, place)
        except StokerError:
            self._target.fail(position)
            raise
        self.digests[position] = digest
        self._partial.pop(position, None)
        self._fetched_bytes += len(place)
        if self._target.copy_first:
            await self._store(position, place, copy, digest)
            self._target.publish(position)
        else:
            self._target.publish(position)
            self._copies.create_task(self._store(position, place, copy, digest), name="store")

    async def _arrive(self, position: int, place: memoryview) -> tuple[str, Copy | None]:
        """Until the place holds what belongs there: its digest, and the copy that is being made of it."""
        expected = self._checkpoint.digest(position)
        copy = await self._copy(position, place)
        try:
            copy, done_bytes = await self._begun(copy)
            while True:
                origin, said, mixed = None, "", False
                if done_bytes < len(place):
                    origin, said = await self._read(position, place, done_bytes, copy)
                    mixed = origin is None
                digest = await self._digest(place)
                wanted = expected or said
                # Bytes that nothing vouches for have to be of one origin: one that broke off may have given wrong ones.
                if digest == wanted or not (wanted or mixed):
                    if copy is not None:
                        copy.arrived(len(place))
                    return digest, copy
                copy = await self._anew(position, place, copy)
                if origin is not None and not done_bytes:  # else the bytes of an earlier run may be the wrong ones
                    shard, offset, _ = self._checkpoint.place(position)
                    reason = (
                        f"the chunk at byte {offset}, from {origin.name}, has another digest than the registered one"
                    )
                    (await self._found()).give_up(origin, CorruptCheckpoint(f"{self._checkpoint.name}/{shard}", reason))
                done_bytes = 0
        except BaseException:
            if copy is not None:
                await copy.close()
            raise

    async def _begun(self, copy: Copy | None) -> tuple[Copy | None, int]:
        """Put in place what an earlier run left of the copy: so many bytes. A disk that does not give them costs the copy."""
        if copy is None or not copy.begun_bytes:
            return copy, 0
        begun_bytes = copy.begun_bytes
        try:
            await copy.read_begun()
        except StorageFailed as error:
            await copy.close()
            self._shelving.failed(error)
            return None, 0
        return copy, begun_bytes

    async def _anew(self, position: int, place: memoryview, copy: Copy | None) -> Copy | None:
        """What was copied so far is wrong."""
        if copy is None:
            return None
        try:
            await copy.discard()
        except StorageFailed as error:
            self._shelving.failed(error)
            return None
        return await self._copy(position, place)

    async def _read(
        self, position: int, place: memoryview, done_bytes: int, copy: Copy | None
    ) -> tuple[Origin | None, str]:
        # While a model's digests are not known only its own source's bytes may lie in a part, where the next who goes on
        # with it cannot tell whose they are.
        trusted = True
        bound = bool(self._checkpoint.digest(position))

        def arrived(size_bytes: int, origin: Origin) -> None:
            nonlocal trusted
            trusted = trusted and (bound or origin.tier is Tier.REMOTE)
            self._partial[position] = size_bytes
            if copy is not None and trusted:
                copy.arrived(size_bytes)

        origins = await self._found()
        async with self._slots.taken(self._turn):
            return await origins.read(position, done_bytes, place, arrived)

    async def _found(self) -> Origins:
        async with self._finding:
            if self._origins is None:
                self._origins = await self._find_origins()
            return self._origins

    async def _copy(self, position: int, place: memoryview) -> Copy | None:
        try:
            part = await self._shelving.part(position)
        except (TierFull, StorageFailed) as error:
            self._shelving.failed(error)
            return None
        if part is None:
            return None
        copy = Copy(part, place, room=self._rooms)
        copy.start()
        return copy

    async def _store(self, position: int, place: memoryview, copy: Copy | None, digest: str) -> None:
        """A disk that fails costs the copy, not the model that is in memory."""
        try:
            while copy is not None:
                try:
                    await self._shelving.arriving(position, digest)
                    await copy.finish(digest)
                    await self._shelving.arrived(position, digest)
                    break
                except asyncio.CancelledError:  # the disk may have been done with it all the same
                    await self._shelving.stray(digest)
                    raise
                except TierFull as error:
                    if not await self._room(copy):
                        self._shelving.failed(error)
                        break
                await copy.close()
                copy = await self._copy(position, place)
                if copy is not None:
                    copy.arrived(len(place))
        except StorageFailed as error:
            self._shelving.failed(error)
        finally:
            if copy is not None:
                await copy.close()
            self._target.done(position)

    async def _room(self, copy: Copy) -> bool:
        """Whether a copy that found the disk full is worth another try. Of those that found so at once, one makes room for all."""
        async with self._making_room:
            if copy.room == self._rooms:
                if not await self._shelving.make_room():
                    return False
                self._rooms += 1
            return True


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that made the others: what its siblings raised on being stopped comes after it."""
    leaves = list(_leaves(failures))
    return next((leaf for leaf in leaves if isinstance(leaf, StokerError)), leaves[0])


def _leaves(failures: BaseExceptionGroup[BaseException]) -> Iterable[BaseException]:
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from _leaves(failure)
        else:
            yield failure

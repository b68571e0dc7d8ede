"""Weights on their way to a GPU: for each lease that asks for it a ring in device memory, filled from the pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial

from stoker_checkpoint import _native
from stoker_checkpoint.device_ring import ordinal_of, spans_of
from stoker_checkpoint.plan import ReadPlan
from stoker_checkpoint.pool import Pool
from stoker_core.errors import InvalidSettings, NativeUnavailable
from stoker_core.logging import get_logger
from stoker_storeagent.ports import Filling
from stoker_storeagent.threads import in_thread

log = get_logger("rings")

MAKE_S = 10.0
"""How long a lease waits for its ring. The first one on a device also makes the CUDA context there."""
END_S = 60.0
"""How long the copies in flight may take to end before a ring is given up."""

Descriptors = tuple[int, ...]
Made = tuple[_native.DeviceRing, list[tuple[int, int]]]
"""A ring, and what of each position is copied into it: offset and size."""


class Rings:
    def __init__(self, pool: Pool, slots: int) -> None:
        """slots: chunks of each ring; 0: there are no rings. Raises InvalidSettings for 1."""
        if slots == 1:
            raise InvalidSettings("STOKER_STOREAGENT_RING_SLOTS: a ring has at least 2; 0 is for none")
        self._pool, self._slots = pool, slots
        self._stuck: list[_Feed] = []  # kept: letting go of one would wait for it
        self._silent: set[str] = set()  # devices that still owe an answer

    @asynccontextmanager
    async def feed(self, device: str, filling: Filling, plan: ReadPlan) -> AsyncIterator[Descriptors]:
        """Fill a ring with `filling` as it becomes ready: descriptors of the ring and of its board.

        None come if no device is asked for or rings are switched off, nor, with a warning, if the driver refuses one.
        Afterwards nothing of it touches pool or device any more. What the consumer has mapped of the ring stays as it is.
        """
        feed = await self._begin(device, filling, plan) if device and self._slots else None
        if feed is None:
            yield ()
            return
        try:
            yield feed.ring.fileno(), feed.feeder.board_fd
        finally:
            await in_thread(partial(self._end, feed, device), threading.Event())

    async def _begin(self, device: str, filling: Filling, plan: ReadPlan) -> _Feed | None:
        try:
            ring, spans = await self._made(device, plan)
            feeder = _native.Feeder(ring, _native.Board.open(filling.board_fd), self._pool.native, spans)
        except (NativeUnavailable, RuntimeError, ValueError, OSError) as error:  # the client copies from the pool then
            log.warning("no_ring", device=device, bytes=self._slots * _native.CHUNK_BYTES, error=str(error))
            return None
        return _Feed(ring, feeder)

    async def _made(self, device: str, plan: ReadPlan) -> Made:
        """Raises what `_make` raises, NativeUnavailable also if the device does not answer: later leases do not ask it again
        until it does."""
        if device in self._silent:
            raise NativeUnavailable("the device still does not answer")
        making = asyncio.wrap_future(_start_making(device, self._slots, plan))
        await asyncio.wait([making], timeout=MAKE_S)
        if not making.done():
            self._silent.add(device)
            making.add_done_callback(partial(self._answered, device))
            raise NativeUnavailable(f"the device did not answer within {MAKE_S:g} s")
        return making.result()

    def _answered(self, device: str, making: asyncio.Future[Made]) -> None:
        self._silent.discard(device)
        if not making.cancelled():
            making.exception()  # seen: its lease has gone on without

    def _end(self, feed: _Feed, device: str) -> None:
        if not feed.close(END_S):
            self._stuck.append(feed)
            log.error("ring_stuck", device=device, seconds=END_S)


class _Feed:
    def __init__(self, ring: _native.DeviceRing, feeder: _native.Feeder) -> None:
        self.ring, self.feeder = ring, feeder

    def close(self, timeout_s: float) -> bool:
        """End it and let go of the device memory, which waits for the device. False: a copy still runs after that time."""
        self.feeder.cancel()
        if not self.feeder.join(timeout_s):
            return False
        del self.feeder, self.ring
        return True


def _start_making(device: str, slots: int, plan: ReadPlan) -> Future[Made]:
    """In a thread of its own, which nobody waits for at the end: a driver may never answer."""
    making: Future[Made] = Future()

    def make() -> None:
        try:
            making.set_result(_make(device, slots, plan))
        except BaseException as error:  # noqa: BLE001 - who waits for it hears of it
            making.set_exception(error)

    threading.Thread(target=make, name="make ring", daemon=True).start()
    return making


def _make(device: str, slots: int, plan: ReadPlan) -> Made:
    """Raises NativeUnavailable, RuntimeError, ValueError, OSError."""
    return _native.DeviceRing(ordinal_of(device), slots), spans_of(plan)

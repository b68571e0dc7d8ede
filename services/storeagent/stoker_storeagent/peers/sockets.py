"""What both ends of a connection do with their socket: messages, and bytes from a file or into memory without a copy between.

asyncio's streams would copy every byte into a buffer of theirs first.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from stoker_core.errors import StorageFailed
from stoker_storeagent.telling import Telling
from stoker_storeagent.threads import Threads
from stoker_storeagent.throttle import Throttle

PIECE_BYTES = 1024 * 1024
"""What goes through the throttle at once, and between two turns of the event loop."""

_NO_SENDFILE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})  # e.g. of hugetlbfs
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)
R = TypeVar("R")


class Side(Protocol[E_co]):
    @property
    def needed(self) -> int: ...
    def receive(self, data: bytes) -> E_co | None: ...


async def next_message(connection: socket.socket, side: Side[E]) -> E:
    """What the other end says next. Raises ConnectionResetError at the end, and what `side` raises."""
    loop = asyncio.get_running_loop()
    while True:
        data = await loop.sock_recv(connection, side.needed)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the other end left")
        message = side.receive(data)
        if message is not None:
            return message


async def send(connection: socket.socket, data: bytes, *, stall_s: float) -> None:
    """Raises TimeoutError if it cannot be sent within stall_s."""
    async with asyncio.timeout(stall_s):
        await asyncio.get_running_loop().sock_sendall(connection, data)


def prepare(connection: socket.socket) -> None:
    """Buffers stay the kernel's to size: it lets them grow further than a program without privileges may set them."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def abort(connection: socket.socket) -> None:
    """Close it now, and send nothing of what it has still to send: the memory that this refers to may change from here on."""
    if connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        connection.close()


async def receive_into(
    connection: socket.socket, into: memoryview, on_bytes: Callable[[int], None], *, throttle: Throttle, stall_s: float
) -> None:
    """Fill `into`. on_bytes: told now and then how many bytes are there.

    Raises ConnectionResetError if they end before, TimeoutError if none comes for stall_s.
    """
    loop, telling, done = asyncio.get_running_loop(), Telling(on_bytes), 0
    try:
        while done < len(into):
            allowed = min(done + PIECE_BYTES, len(into))
            await throttle.take(allowed - done)
            await asyncio.sleep(0)  # a fast peer never makes us wait, and others have their turn
            async with asyncio.timeout(stall_s) as stalled:
                while done < allowed:
                    size = await loop.sock_recv_into(connection, into[done:allowed])
                    if not size:
                        raise ConnectionResetError(errno.ECONNRESET, f"it left after {done} of {len(into)} bytes")
                    done += size
                    telling.came(done)
                    stalled.reschedule(loop.time() + stall_s)
    finally:
        telling.end()


class Sending:
    """Sends pieces of files.

    Memory is sent from the event loop. Anything else may have to wait for a disk, which is for `threads`.
    """

    def __init__(self, threads: Threads, throttle: Throttle, *, stall_s: float) -> None:
        """stall_s: how long a receiver may take nothing."""
        self._threads, self._throttle, self._stall_s = threads, throttle, stall_s

    async def send(self, connection: socket.socket, fd: int, offset: int, size_bytes: int) -> None:
        """The kernel may refer to the file's pages until the receiver has them all: they must not change before.

        Raises OSError, TimeoutError for a stalled receiver, StorageFailed if the file is too short.
        """
        in_memory = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        end = offset + size_bytes
        while offset < end:
            piece = min(PIECE_BYTES, end - offset)
            await self._throttle.take(piece)
            await self._piece(connection, fd, offset, piece, in_memory=in_memory)
            offset += piece
            await asyncio.sleep(0)  # a fast receiver never makes us wait, and others have their turn

    async def _piece(
        self, connection: socket.socket, fd: int, offset: int, size_bytes: int, *, in_memory: bool
    ) -> None:
        end = offset + size_bytes
        while offset < end:
            try:
                sent = await self._run(in_memory, partial(os.sendfile, connection.fileno(), fd, offset, end - offset))
            except BlockingIOError:
                async with asyncio.timeout(self._stall_s):
                    await _writable(connection)
                continue
            except OSError as error:
                if error.errno not in _NO_SENDFILE:
                    raise
                data = await self._run(in_memory, partial(os.pread, fd, end - offset, offset))
                await send(connection, data, stall_s=self._stall_s)
                sent = len(data)
            if not sent:
                raise StorageFailed(f"descriptor {fd}", f"it ends before byte {end}")
            offset += sent

    async def _run(self, in_memory: bool, work: Callable[[], R]) -> R:
        return work() if in_memory else await self._threads.run(work)


async def _writable(connection: socket.socket) -> None:
    loop, writable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(connection, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(connection)

"""Unix sockets for one user's processes: lines, and descriptors beside them."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from stoker_core.errors import InvalidMessage, InvalidSettings
from stoker_core.logging import get_logger

log = get_logger("unix")

PATH_BYTES_MAX = 107
"""sun_path in unix(7), less its final zero."""
PROBE_S = 1.0
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
READ_BYTES = 64 * 1024
_INT_BYTES = array("i").itemsize


def listen(path: Path, *, setting: str, who: str, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket that only this user may use. A socket file that nobody listens on any more is replaced.

    setting: what chooses the path.  who: listens there, a kind of process.
    Raises InvalidSettings if somebody listens there, if something else has that name, or if the path is too long.
    """
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise InvalidSettings(f"{setting}: {path} has more than the {PATH_BYTES_MAX} bytes of a Unix socket's path")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise InvalidSettings(f"{setting}: {path} is no socket; it is left as it is")
    if path.exists() and _answers(path):
        raise InvalidSettings(f"{setting}: another {who} listens on {path}")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file has this mode from its first moment
        listener.bind(str(path))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (TimeoutError, BlockingIOError):  # it listens, and is too busy to accept
            return True
        return True


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection. Without descriptors it waits: others will give theirs back."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:
            log.warning("not_accepted", error=str(error))
            await asyncio.sleep(ACCEPT_PAUSE_S)
        else:
            return connection


def close(listener: socket.socket) -> None:
    """Stop listening and remove the socket's file."""
    # The file first: as long as this one listens nobody puts another in its place.
    Path(listener.getsockname()).unlink(missing_ok=True)
    listener.close()


class Connection:
    """One end of a connection. The socket itself, not an asyncio stream: a stream cannot pass descriptors.

    line_bytes_max, descriptors_max: of what the other side sends; descriptors are those that were not fetched yet.
    Raises OSError when the other side is gone, InvalidMessage over a limit: the connection must be closed then.
    """

    def __init__(self, connection: socket.socket, *, line_bytes_max: int, descriptors_max: int = 0) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._line_bytes_max, self._descriptors_max = line_bytes_max, descriptors_max
        self._received = b""
        self._descriptors: list[int] = []

    async def line(self) -> bytes:
        """The next line, with its end, or b'' at the end of all."""
        while b"\n" not in self._received[: self._line_bytes_max + 1]:
            if len(self._received) > self._line_bytes_max:
                raise InvalidMessage(f"a line is longer than {self._line_bytes_max} bytes")
            data = await self._receive()
            if not data:
                return b""
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    def descriptors(self) -> tuple[int, ...]:
        """Those that came so far, in their order: with the last line if nothing follows it unasked. The caller's to close."""
        came, self._descriptors = tuple(self._descriptors), []
        return came

    async def send(self, line: bytes, descriptors: Sequence[int] = ()) -> None:
        """line: without its end.  descriptors: the other side gets copies of these together with its first byte."""
        data = line + b"\n"
        if descriptors:
            data = data[await self._send_with(data, descriptors) :]
        if data:  # who has all of it may have left already
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def check(self) -> None:
        """Raises ConnectionResetError if the other side has left."""
        try:
            left = not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if left:
            raise ConnectionResetError("the client left")

    def close(self) -> None:
        """Idempotent. Descriptors that nobody fetched are closed too."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    async def _receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        # Room for exactly so many: the kernel itself closes what comes beyond. Not socket.recv_fds: it forgets its flags.
        room = socket.CMSG_LEN(self._descriptors_max * _INT_BYTES) if self._descriptors_max else 0
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
                break
            except (BlockingIOError, InterruptedError):
                await _ready(self._socket, loop.add_reader, loop.remove_reader)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors += array("i", content[: len(content) // _INT_BYTES * _INT_BYTES])
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > self._descriptors_max:
            raise InvalidMessage(
                f"more descriptors came than the {self._descriptors_max} that may, or than can be opened"
            )
        return data

    async def _send_with(self, data: bytes, descriptors: Sequence[int]) -> int:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.send_fds(self._socket, [data], list(descriptors))
            except (BlockingIOError, InterruptedError):  # who reads late what came before
                await _ready(self._socket, loop.add_writer, loop.remove_writer)


async def _ready(
    connection: socket.socket,
    watch: Callable[[socket.socket, Callable[[], None]], object],
    unwatch: Callable[[socket.socket], object],
) -> None:
    ready = asyncio.Event()
    watch(connection, ready.set)
    try:
        await ready.wait()
    finally:
        unwatch(connection)

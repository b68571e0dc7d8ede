"""One client's end of the Unix socket: messages a line each, descriptors beside them, and whether it is still there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from stoker_contracts.codec import Contract, encode
from stoker_contracts.storage import LINE_LIMIT_BYTES
from stoker_core.errors import InvalidMessage

READ_BYTES = 64 * 1024


class Connection:
    """The socket itself, not an asyncio stream: a stream cannot pass descriptors. Raises OSError when the client is gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._received = b""

    async def line(self) -> bytes:
        """The next line, or b'' at the end. Raises InvalidMessage over the limit."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._received[: LINE_LIMIT_BYTES + 1]:
            if len(self._received) > LINE_LIMIT_BYTES:
                raise InvalidMessage(f"a line is longer than {LINE_LIMIT_BYTES} bytes")
            data = await loop.sock_recv(self._socket, READ_BYTES)
            if not data:
                return b""
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    async def send(self, message: Contract, descriptors: Sequence[int] = ()) -> None:
        """descriptors: the client gets copies of these together with the first byte of the message."""
        data = encode(message) + b"\n"
        if descriptors:
            data = data[await self._send_with(data, descriptors) :]
        if data:  # a client that has all may have left already
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def _send_with(self, data: bytes, descriptors: Sequence[int]) -> int:
        while True:
            try:
                return socket.send_fds(self._socket, [data], list(descriptors))
            except (BlockingIOError, InterruptedError):  # a client that reads its progress late
                await self._writable()

    async def _writable(self) -> None:
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._socket)

    def check(self) -> None:
        """Raises ConnectionResetError if the client has left."""
        try:
            left = not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if left:
            raise ConnectionResetError("the client left")

    def close(self) -> None:
        self._socket.close()

"""An instance's side of the storage agent's socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.storage import LeaseGranted, LeaseProgress, LeaseRefused, LeaseReply, LeaseRequest, LeaseUsed

ANSWER_S = 30.0
DESCRIPTORS_MAX = 8


class LeaseClient:
    """descriptors: what came with the grant: the pool's and the board's. Closed with the client."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._received = b""
        self.progress: list[LeaseProgress] = []
        self.descriptors: list[int] = []

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def send(self, message: Contract) -> None:
        await self.write(encode(message) + b"\n")

    async def answer(self) -> LeaseGranted | LeaseRefused | None:
        """The next answer that is no progress; None at the end of the connection."""
        async with asyncio.timeout(ANSWER_S):
            while line := await self._line():
                reply = decode(LeaseReply, line)
                if not isinstance(reply, LeaseProgress):
                    assert isinstance(reply, LeaseGranted | LeaseRefused)
                    return reply
                self.progress.append(reply)
        return None

    async def lease(self, model_id: str, instance_id: str = "instance-1") -> LeaseGranted:
        await self.send(LeaseRequest(model_id=model_id, instance_id=instance_id))
        reply = await self.answer()
        assert isinstance(reply, LeaseGranted), reply
        return reply

    async def refused(self, model_id: str) -> LeaseRefused:
        await self.send(LeaseRequest(model_id=model_id, instance_id="instance-1"))
        reply = await self.answer()
        assert isinstance(reply, LeaseRefused), reply
        return reply

    async def used(self, load_ms: float, read_bytes: int) -> None:
        await self.send(LeaseUsed(load_ms=load_ms, read_bytes=read_bytes))

    def close(self) -> None:
        """What the kernel does for a process that dies, too."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        self._socket.close()

    async def _line(self) -> bytes:
        while b"\n" not in self._received:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, DESCRIPTORS_MAX)
            except BlockingIOError:
                await self._readable()
                continue
            self.descriptors += descriptors
            if not data:
                return b""
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    async def _readable(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._socket)


@contextlib.asynccontextmanager
async def lease_client(path: Path) -> AsyncIterator[LeaseClient]:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, str(path))
    client = LeaseClient(connection)
    try:
        yield client
    finally:
        client.close()

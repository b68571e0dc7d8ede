"""An instance's side of the storage agent's socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.storage import LeaseGranted, LeaseProgress, LeaseRefused, LeaseReply, LeaseRequest, LeaseUsed

ANSWER_S = 30.0


class LeaseClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.progress: list[LeaseProgress] = []

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send(self, message: Contract) -> None:
        await self.write(encode(message) + b"\n")

    async def answer(self) -> LeaseGranted | LeaseRefused | None:
        """The next answer that is no progress; None at the end of the connection."""
        async with asyncio.timeout(ANSWER_S):
            while line := await self._reader.readline():
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

    def abort(self) -> None:
        """What the kernel does for a process that dies."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def lease_client(path: Path) -> AsyncIterator[LeaseClient]:
    client = LeaseClient(*await asyncio.open_unix_connection(str(path)))
    try:
        yield client
    finally:
        await client.close()

"""A storage agent's socket that grants every lease at once: for tests of the worker alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from stoker_contracts.codec import decode, encode
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted, LeaseRefused, LeaseRequest


class FakeStore:
    """open_leases: connections that hold one now.  refuse: answer this instead of granting.  silent: answer nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.open_leases = 0
        self.refuse: LeaseRefused | None = None
        self.silent = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            decode(LeaseRequest, await reader.readline())
            self.open_leases += 1
            if self.silent:
                await reader.read()
                return
            reply = self.refuse or LeaseGranted(path=str(self._directory), source=Tier.SSD, total_bytes=1, wait_ms=0.5)
            writer.write(encode(reply) + b"\n")
            await writer.drain()
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.open_leases -= 1
            writer.close()


@contextlib.asynccontextmanager
async def fake_store(socket_path: Path, directory: Path) -> AsyncIterator[FakeStore]:
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    store = FakeStore(directory)
    server = await asyncio.start_unix_server(store._serve, str(socket_path))
    try:
        yield store
    finally:
        server.close()

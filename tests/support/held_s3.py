"""An S3 that holds chunks of weights back until the test lets them go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from tests.support.s3_server import FaultyS3

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_cli.bench.s3_server import Span

BUCKET = "models"
HEAD_BYTES = 64 * 1024
"""What is shorter is a header or a small file, and never held."""


class HeldS3(FaultyS3):
    """held: chunks of which no byte is sent.  waiting: those that somebody waits for, by position in their shard.

    weight_bytes: sent of shards, headers alone not counted.
    """

    def __init__(self, root: Path, *, bytes_per_s: int = 0) -> None:
        super().__init__(root, bytes_per_s=bytes_per_s)
        self.held: set[int] = set()
        self.waiting: set[int] = set()
        self._small_bytes = 0
        self._changed = asyncio.Condition()

    @property
    def weight_bytes(self) -> int:
        return self.sent_bytes - self._small_bytes

    @property
    def settings(self) -> dict[str, object]:
        """Of an agent that asks here."""
        return {"s3_endpoint_url": self.url, "s3_anonymous": True, "s3_region": "us-east-1"}

    @property
    def environment(self) -> dict[str, str]:
        """The same, of an agent that is a process."""
        return {f"STOKER_STOREAGENT_{key.upper()}": str(value) for key, value in self.settings.items()}

    def folder(self, name: str) -> Path:
        """Where the files of a model lie."""
        return self.root / BUCKET / name

    def source(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    async def let_go(self, *positions: int) -> None:
        """Without any: all."""
        async with self._changed:
            self.held -= set(positions) or self.held.copy()
            self._changed.notify_all()

    async def send(self, transport: asyncio.Transport, file: BinaryIO, span: Span) -> None:
        position = span.offset // CHUNK_BYTES
        if span.size_bytes <= HEAD_BYTES:
            self._small_bytes += span.size_bytes
            await super().send(transport, file, span)
            return
        self.waiting.add(position)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: position not in self.held)
        finally:
            self.waiting.discard(position)
        if transport.is_closing():
            raise ConnectionResetError("who asked has left")
        await super().send(transport, file, span)


@contextlib.asynccontextmanager
async def held_s3(tmp_path: Path, *, bytes_per_s: int = 0) -> AsyncIterator[HeldS3]:
    root = tmp_path / "s3"
    (root / BUCKET).mkdir(parents=True)
    async with HeldS3(root, bytes_per_s=bytes_per_s) as server:
        try:
            yield server
        finally:
            await server.let_go()

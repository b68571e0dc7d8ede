"""The stages of a cold load, each alone: with the parts that a storage agent is made of, and nothing beside them."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_cli.bench.tiers_child import Job
from stoker_core.errors import CorruptCheckpoint
from stoker_core.ids import RandomIds
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.copying import Copy
from stoker_storeagent.peers.sockets import PIECE_BYTES
from stoker_storeagent.records import Checkpoint
from stoker_storeagent.sources.s3 import S3Settings, S3Source

MODEL_ID = "alone"


class Alone:
    """`prepare` first: it fills the buffer, so that none of its pages is new to anybody who is measured."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._source = S3Source(S3Settings(endpoint_url=job.endpoint_url, anonymous=True, connections=2 * job.at_once))

    async def prepare(self) -> None:
        """Raises what `S3Source.inspect` raises."""
        found = await self._source.inspect(self._job.url)
        self._checkpoint = Checkpoint(
            model_id=MODEL_ID, name=MODEL_ID, source=found.source, manifest=found.manifest, versions=found.versions
        )
        positions = range(self._checkpoint.positions)
        self._buffer = mmap.mmap(-1, len(positions) * CHUNK_BYTES)
        for position in positions:
            shard, offset, _ = self._checkpoint.place(position)
            with (Path(self._job.directory) / shard).open("rb", buffering=0) as file:
                os.preadv(file.fileno(), [self._place(position)], offset)
        self._digests = [chunk_digest(self._place(position)) for position in positions]

    async def fetch(self) -> float:
        """Seconds. Raises CorruptCheckpoint if what came is not what the checkpoint has."""
        began_s = time.perf_counter()
        await self._each(self._fetch)
        seconds = time.perf_counter() - began_s
        if any(chunk_digest(self._place(at)) != digest for at, digest in enumerate(self._digests)):
            raise CorruptCheckpoint(self._job.url, "other bytes came than the directory has")
        return seconds

    async def write(self) -> float:
        """Seconds until every chunk has its name on the disk."""
        disk = SsdDirectory(Path(self._job.scratch), RandomIds(), threads=self._job.threads)
        try:
            await disk.open()

            async def one(position: int) -> None:
                copy = Copy(await disk.part(MODEL_ID, position), self._place(position))
                copy.start()
                copy.arrived(len(self._place(position)))
                await copy.finish(self._digests[position])
                await copy.close()

            began_s = time.perf_counter()
            await self._each(one)
            seconds = time.perf_counter() - began_s
            for digest in self._digests:
                await disk.remove(digest)
        finally:
            disk.close()
        return seconds

    def receive(self, port: int) -> float:
        """Seconds from the word to begin to the last byte."""
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began_s = time.perf_counter()
            connection.send(b"!")
            for position in range(self._checkpoint.positions):
                place, done = self._place(position), 0
                while done < len(place):
                    received = connection.recv_into(place[done : done + PIECE_BYTES])
                    if not received:
                        raise ConnectionError("the sender left")
                    done += received
            return time.perf_counter() - began_s

    async def _fetch(self, position: int) -> None:
        shard, offset, _ = self._checkpoint.place(position)
        version = self._checkpoint.versions.get(shard, "")
        await self._source.read(
            self._checkpoint.source, shard, version, offset, self._place(position), lambda size_bytes: None
        )

    async def _each(self, work: Callable[[int], Awaitable[None]]) -> None:
        """In the order of the positions, as many at once as an agent would."""
        left = iter(range(self._checkpoint.positions))

        async def some() -> None:
            for position in left:
                await work(position)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._job.at_once):
                group.create_task(some())

    def _place(self, position: int) -> memoryview:
        begin = position * CHUNK_BYTES
        return memoryview(self._buffer)[begin : begin + self._checkpoint.place(position)[2]]

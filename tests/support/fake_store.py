"""A storage agent's socket that grants every lease at once, with real descriptors: for tests of the worker alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.leased import leased_folder

from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reading import Reading
from stoker_contracts.codec import decode, encode
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted, LeaseRefused, LeaseRequest

READ_S = 30.0


class FakeStore:
    """open_leases: connections that hold one now.  refuse: answer this instead of granting.  silent: answer nothing."""

    def __init__(self, directory: Path, reading: Reading) -> None:
        self._directory, self._reading = directory, reading
        self.open_leases = 0
        self.refuse: LeaseRefused | None = None
        self.silent = False

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                connection, _ = await loop.sock_accept(listener)
                connection.setblocking(False)
                group.create_task(self._lease(connection))

    async def _lease(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.open_leases += 1
        try:
            line = await loop.sock_recv(connection, 65536)
            request: LeaseRequest = decode(LeaseRequest, line)
            if not self.silent:
                self._answer(connection, request)
            while await loop.sock_recv(connection, 65536):
                pass
        except ConnectionError:
            pass
        finally:
            self.open_leases -= 1
            connection.close()

    def _answer(self, connection: socket.socket, request: LeaseRequest) -> None:
        granted = LeaseGranted(path=str(self._directory), source=Tier.SSD, total_bytes=1, wait_ms=0.5)
        descriptors = [] if self.refuse else [self._reading.pool_fd, self._reading.board_fd]
        socket.send_fds(connection, [encode(self.refuse or granted) + b"\n"], descriptors)


@contextlib.asynccontextmanager
async def fake_store(socket_path: Path, directory: Path) -> AsyncIterator[FakeStore]:
    """directory: of a checkpoint, which is read into a pool of its size."""
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    manifest = open_checkpoint(directory)
    plan = plan_reads(manifest)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(len(plan.positions) * CHUNK_BYTES, huge="none", lock=False, fault_threads=1))
        reading = stack.enter_context(contextlib.closing(pool.read(plan, manifest, directory)))
        folder = leased_folder(directory, manifest, Path(stack.enter_context(TemporaryDirectory())))
        await asyncio.to_thread(reading.wait_blocking, READ_S)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.setblocking(False)
        listener.bind(str(socket_path))
        listener.listen()
        store = FakeStore(folder, reading)
        serving = asyncio.create_task(store.serve(listener))
        try:
            yield store
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

"""A lease as an instance holds it, with the agent's side in the same process: what it reads can be taken away at will."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.leased import leased_folder

from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.readers import make_reader
from stoker_checkpoint.reading import Reading
from stoker_checkpoint.vllm_loader import connected

READ_S = 60.0
OTHER_BYTES = b"\xa5"
USED = b"used"
"""What an engine in another process says on the connection when its lease may end, and hears when it has."""


class Lent:
    """Everything of `stoker_worker.instance.lease.Lease` that engines use. load_ms: None until it was used.

    path: a folder without shards, as it is leased.
    """

    def __init__(self, path: Path, pool: Pool, pool_fd: int, board_fd: int) -> None:
        self.path, self.pool, self.pool_fd, self.board_fd = path, pool, pool_fd, board_fd
        self.agent, self.instance = socket.socketpair()
        self.ring_fd = self.ring_board_fd = -1
        self.load_ms: float | None = None

    def fileno(self) -> int:
        return self.instance.fileno()

    def alive(self) -> bool:
        return connected(self.fileno())

    def used(self, *, load_ms: float) -> None:
        self.load_ms = load_ms
        self.end()

    def end(self) -> None:
        """The agent puts something else into the pool."""
        for chunk in range(self.pool.native.chunks_total):
            self.pool.chunk(chunk)[:] = OTHER_BYTES * CHUNK_BYTES

    @property
    def options(self) -> dict[str, int]:
        return {"pool_fd": self.pool_fd, "board_fd": self.board_fd, "lease_fd": self.fileno()}

    @contextmanager
    def ended_when_used_elsewhere(self) -> Iterator[None]:
        """End it when an engine in another process says that it may."""

        def serve() -> None:
            if self.agent.recv(len(USED)) == USED:
                self.end()
                self.agent.sendall(USED)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            self.instance.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def lent(directory: Path) -> Iterator[Lent]:
    """All of a checkpoint, read already."""
    manifest = open_checkpoint(directory)
    plan = plan_reads(manifest)
    with Pool(len(plan.positions) * CHUNK_BYTES, huge="none", lock=False) as pool, TemporaryDirectory() as folder:
        reading: Reading = pool.read(plan, manifest, directory)
        assert reading.wait_blocking(READ_S)
        given = Lent(leased_folder(directory, manifest, Path(folder)), pool, reading.pool_fd, reading.board_fd)
        with given.agent, given.instance:
            yield given


@contextmanager
def abandoned(directory: Path) -> Iterator[Lent]:
    """A checkpoint that nobody goes on reading, because the agent died."""
    manifest = open_checkpoint(directory)
    plan = plan_reads(manifest)
    files = [(str(directory / shard.name), shard.size_bytes, shard.mtime_ns) for shard in manifest.shards]
    with Pool(len(plan.positions) * CHUNK_BYTES, huge="none", lock=False) as pool, TemporaryDirectory() as folder:
        reader = make_reader(pool.native, "threads")
        # Here nobody publishes what was read; the board looks the same.
        load = reader.start(files, plan.extents, pool.native.allocate(len(plan.positions)), hold=True)
        given = Lent(leased_folder(directory, manifest, Path(folder)), pool, pool.reader_fd, load.board.fileno())
        given.agent.close()
        with given.instance:
            yield given
        reader.close()

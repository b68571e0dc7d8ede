"""The processes that `stoker bench tiers` measures with, beside the storage agents.

`python -m stoker_cli.bench.tiers_child FD JOB`: FD is a socket of type SOCK_SEQPACKET, JOB a Job as JSON. A message is JSON,
{"call": name, …}, and names a method of the job's role; its answer is JSON, too. The process ends when its parent closes the
socket.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from stoker_cli.bench.load_child import MESSAGE_BYTES_MAX

LEASE_TIMEOUT_S = 300.0
_SHOWN = 5

Role = Literal["client", "stages", "sender"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """role: what the process is.  directory: the checkpoint's, on this machine.  url, endpoint_url: where S3 has it.

    scratch: a directory on the disk that is measured.  at_once, threads: chunks and writes at a time, as agents have them.
    """

    role: Role
    directory: str = ""
    url: str = ""
    endpoint_url: str = ""
    scratch: str = ""
    at_once: int = 1
    threads: int = 1


class Client:
    """An instance that leases a model and reads one byte of every page of its tensors."""

    def __init__(self, job: Job) -> None:
        from stoker_checkpoint.leased import read_manifest
        from stoker_checkpoint.load import attach
        from stoker_checkpoint.plan import plan_reads
        from stoker_worker.instance.lease import Lease

        self._lease_of, self._attach, self._plan, self._manifest = Lease, attach, plan_reads, read_manifest
        self._number = 0
        self._lease: Any = None
        self._loaded: Any = None
        self._seconds = 0.0

    def lease(self, store: str, model_id: str) -> dict[str, Any]:
        """Until the model is ready. store: the agent's socket.  It is held until `release`."""
        self._number += 1
        began_s = time.perf_counter()
        lease = self._lease = self._lease_of(
            Path(store), model_id=model_id, instance_id=f"bench-{self._number}", timeout_s=LEASE_TIMEOUT_S
        )
        manifest = self._manifest(lease.path)
        self._loaded = self._attach(
            manifest,
            self._plan(manifest),
            lease.pool_fd,
            lease.board_fd,
            directory=lease.path,
            alive=lease.alive,
        )
        self._loaded.touch()
        self._seconds = time.perf_counter() - began_s
        return {"seconds": self._seconds, "source": lease.granted.source, "origin": lease.granted.origin}

    def check(self, record: str) -> dict[str, Any]:
        """Compare what is leased with a record of the checkpoint's tensors."""
        from stoker_cli.bench.load_contestants import wrong_tensors

        tensors = dict(self._loaded.tensors())
        wrong = wrong_tensors(tensors, json.loads(Path(record).read_bytes()))
        return {"wrong": wrong[:_SHOWN], "count": len(wrong)}

    def release(self) -> dict[str, Any]:
        self._loaded.close()
        self._lease.used(load_ms=self._seconds * 1e3)
        self._loaded = self._lease = None
        return {}


class Stages:
    """What a cold load consists of, each part alone, in one buffer that has the checkpoint's bytes from the start."""

    def __init__(self, job: Job) -> None:
        import asyncio

        from stoker_cli.bench.tiers_stages import Alone

        self._runner = asyncio.Runner()
        self._alone = Alone(job)
        self._runner.run(self._alone.prepare())

    def fetch(self) -> dict[str, Any]:
        """From S3 into memory, and nothing else."""
        return {"seconds": self._runner.run(self._alone.fetch())}

    def write(self) -> dict[str, Any]:
        """From memory to the disk, and nothing else."""
        return {"seconds": self._runner.run(self._alone.write())}

    def receive(self, port: int) -> dict[str, Any]:
        """The checkpoint's bytes through one TCP connection, from a `Sender`."""
        return {"seconds": self._alone.receive(port)}


class Sender:
    """Sends the checkpoint's bytes from a memfd to whoever connects."""

    def __init__(self, job: Job) -> None:
        self._fd = os.memfd_create("bench", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(self._fd), "wb") as memory:
            for file in sorted(Path(job.directory).glob("*.safetensors")):
                memory.write(file.read_bytes())
        self._size_bytes = os.fstat(self._fd).st_size
        self._listener = socket.create_server(("127.0.0.1", 0))

    def port(self) -> dict[str, Any]:
        return {"port": self._listener.getsockname()[1]}

    def send(self) -> dict[str, Any]:
        """Once, to the next who connects and says a byte."""
        from stoker_storeagent.peers.sockets import PIECE_BYTES

        connection, _ = self._listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.recv(1)
            sent = 0
            while sent < self._size_bytes:
                piece = min(PIECE_BYTES, self._size_bytes - sent)
                sent += os.sendfile(connection.fileno(), self._fd, sent, piece)
            connection.recv(1)  # until it leaves
        return {}


ROLES: dict[Role, Callable[[Job], Any]] = {"client": Client, "stages": Stages, "sender": Sender}


def main(fd: int, job: Job) -> None:
    with socket.socket(fileno=fd) as parent:
        role = ROLES[job.role](job)
        gc.collect()
        gc.freeze()  # what was imported is not gone through again while something is measured
        parent.send(json.dumps({"ready": True}).encode())
        while message := parent.recv(MESSAGE_BYTES_MAX):
            asked = json.loads(message)
            answer = getattr(role, asked.pop("call"))(**asked)
            parent.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Job))
    os._exit(0)

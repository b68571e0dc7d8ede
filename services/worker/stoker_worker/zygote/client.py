"""The worker's side of a zygote: start it, keep it, ask it to fork; hear from it and its children."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from typing import Protocol

from stoker_contracts.models import EngineKind
from stoker_core.errors import EngineFailed
from stoker_core.logging import get_logger
from stoker_worker.wire import (
    PACKET_BYTES_MAX,
    ChildExited,
    Fork,
    Forked,
    ForkRefused,
    FromZygote,
    InstanceConfig,
    Prepare,
    Prepared,
    ZygoteReady,
    pack,
    packet_pair,
    unpack,
)

log = get_logger("zygote")

_BACKOFF_S = (0.1, 0.5, 2.0, 5.0, 10.0)


class ZygoteListener(Protocol):
    def zygote_ready(self) -> None: ...

    def zygote_lost(self, engine: EngineKind) -> None:
        """After `exited` for each of its instances."""
        ...

    def forked(self, instance_id: str, pid: int) -> None: ...

    def prepared(self, architecture: str, failure: str) -> None: ...

    def exited(self, instance_id: str, status: int | None, reason: str) -> None:
        """status: exit code, or minus the signal; None where it was not learnt."""
        ...


class Zygote:
    """One engine's zygote; restarted with back-off when it dies, and with it its instances."""

    def __init__(
        self,
        engine: EngineKind,
        *,
        environment: Mapping[str, str],
        cuda: bool,
        ready_timeout_s: float,
        listener: ZygoteListener,
    ) -> None:
        self.engine = engine
        self.ready = False
        self.pid = 0
        self._environment, self._cuda = environment, cuda
        self._ready_timeout_s, self._listener = ready_timeout_s, listener
        self._control: socket.socket | None = None
        self._children: set[str] = set()

    async def run(self) -> None:
        """Keep a zygote alive until cancelled."""
        failures = 0
        while True:
            ours, theirs = packet_pair()
            process = await self._spawn(theirs)
            self.pid = process.pid
            try:
                was_ready = await self._serve(ours, process)
            finally:
                self.ready, self._control = False, None
                ours.close()
                if process.returncode is None:
                    process.kill()
                await process.wait()
            failures = 0 if was_ready else failures + 1
            for instance_id in list(self._children):
                self._ended(instance_id, None, "its zygote died")
            self._listener.zygote_lost(self.engine)
            pause_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            log.error("zygote_died", engine=self.engine, status=process.returncode, restart_in_s=pause_s)
            await asyncio.sleep(pause_s)

    def fork(self, config: InstanceConfig, channel: socket.socket) -> None:
        """Ask for an instance; `forked` or `exited` follows. Raises EngineFailed if the zygote is not ready."""
        if not self.ready or self._control is None:
            raise EngineFailed(f"the {self.engine} zygote is not ready")
        try:
            socket.send_fds(self._control, [pack(Fork(config=config))], [channel.fileno()])
        except OSError as error:
            raise EngineFailed(f"the {self.engine} zygote does not listen: {error}") from error
        self._children.add(config.instance_id)

    def prepare(self, architecture: str) -> None:
        """Pay an architecture's first start; `prepared` follows, unless the zygote dies. Raises EngineFailed if it is not ready."""
        if not self.ready or self._control is None:
            raise EngineFailed(f"the {self.engine} zygote is not ready")
        try:
            self._control.send(pack(Prepare(architecture=architecture)))
        except OSError as error:
            raise EngineFailed(f"the {self.engine} zygote does not listen: {error}") from error

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        fd = theirs.fileno()
        arguments = [
            *("-m", "stoker_worker.zygote.main"),
            *("--engine", self.engine.value, "--fd", str(fd), "--parent", str(os.getpid())),
        ]
        if self._cuda:
            arguments.append("--cuda")
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                pass_fds=(fd,),
                env=dict(self._environment),
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()

    async def _serve(self, ours: socket.socket, process: asyncio.subprocess.Process) -> bool:
        """Handle its messages until it is gone; returns whether it ever was ready."""
        ours.setblocking(False)
        self._control = ours
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                packet = await _receive(ours)
        except TimeoutError:
            log.error("zygote_not_ready", engine=self.engine, timeout_s=self._ready_timeout_s)
            return False
        while packet:
            self._handle(unpack(FromZygote, packet))
            packet = await _receive(ours)
        return self.ready

    def _handle(self, message: FromZygote) -> None:
        match message:
            case ZygoteReady(import_ms=import_ms):
                self.ready = True
                log.info("zygote_ready", engine=self.engine, import_ms=round(import_ms))
                self._listener.zygote_ready()
            case Forked(instance_id=instance_id, pid=pid):
                self._listener.forked(instance_id, pid)
            case ForkRefused(instance_id=instance_id, reason=reason):
                self._ended(instance_id, None, reason)
            case Prepared(architecture=architecture, failure=failure):
                self._listener.prepared(architecture, failure)
            case ChildExited(instance_id=instance_id, status=status):
                self._ended(instance_id, status, "")

    def _ended(self, instance_id: str, status: int | None, reason: str) -> None:
        self._children.discard(instance_id)
        self._listener.exited(instance_id, status, reason)


async def _receive(control: socket.socket) -> bytes:
    """The next packet; empty once the other side is gone, in whatever state it left the socket."""
    try:
        return await asyncio.get_running_loop().sock_recv(control, PACKET_BYTES_MAX)
    except ConnectionError:
        return b""

"""The lease on a model's files: a connection to the node's storage agent. Blocking: an engine cannot start without."""

from __future__ import annotations

import os
import socket
import time
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from stoker_checkpoint.vllm_loader import connected
from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.storage import (
    LINE_LIMIT_BYTES,
    LeaseGranted,
    LeaseProgress,
    LeaseRefused,
    LeaseReply,
    LeaseRequest,
    LeaseUsed,
)
from stoker_core.errors import InvalidMessage, LeaseDenied

_DESCRIPTORS, _WITH_RING = 2, 4
_INT_BYTES = array("i").itemsize


class Lease:
    """Held from construction to `used` or `close`. Raises LeaseDenied: refused, agent unreachable, or not within timeout_s.

    pool_fd, board_fd: of the agent's pool and of this load in it, as `stoker_checkpoint.load.attach` takes them.
    ring_fd, ring_board_fd: as `stoker_checkpoint.device_ring.attach_ring` takes them, if the agent feeds a ring on `device`
    (the UUID of a GPU; empty: none is asked for); else -1. All of them and the connection close with the lease.
    """

    def __init__(
        self, socket_path: Path, *, model_id: str, instance_id: str, timeout_s: float, device: str = ""
    ) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        self._fds: list[int] = []
        try:
            self._connect(socket_path)
            self._send(LeaseRequest(model_id=model_id, instance_id=instance_id, device=device))
            self.granted = self._await_grant()
            expected = _WITH_RING if self.granted.ring else _DESCRIPTORS
            if len(self._fds) != expected:
                raise LeaseDenied(f"the storage agent sent {len(self._fds)} descriptors with its grant, not {expected}")
        except OSError as error:
            self.close()
            raise LeaseDenied(f"storage agent at {socket_path}: {error}") from error
        except BaseException:
            self.close()
            raise
        self.path = Path(self.granted.path)
        self.pool_fd, self.board_fd, self.ring_fd, self.ring_board_fd = (*self._fds, -1, -1)[:_WITH_RING]

    def fileno(self) -> int:
        return self._socket.fileno()

    def alive(self) -> bool:
        """Whether the agent still holds its end."""
        return self.fileno() >= 0 and connected(self.fileno())

    def used(self, *, load_ms: float) -> None:
        """The engine has its own copy of the weights: the lease ends. A second time it does nothing."""
        try:
            self._send(LeaseUsed(load_ms=load_ms, read_bytes=self.granted.total_bytes))
        except OSError:
            pass  # an observation less; the agent restarted meanwhile, or the lease has ended before
        finally:
            self.close()

    def close(self) -> None:
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _connect(self, path: Path) -> None:
        # A restarting agent is back within moments: its absence alone is no reason to fail a start.
        # With a time limit connecting never waits: to an agent with too many who want to it fails at once.
        self._socket.settimeout(max(0.1, self._left_s()))
        while True:
            try:
                self._socket.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if self._left_s() <= 0:
                    raise
                time.sleep(0.05)

    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _send(self, message: Contract) -> None:
        self._socket.settimeout(max(0.1, self._left_s()))
        self._socket.sendall(encode(message) + b"\n")

    def _await_grant(self) -> LeaseGranted:
        while True:
            match decode(LeaseReply, self._line()):
                case LeaseGranted() as granted:
                    return granted
                case LeaseRefused() as refused:
                    raise LeaseDenied(f"{refused.code}: {refused.message}")
                case LeaseProgress():
                    continue

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > LINE_LIMIT_BYTES:
                raise InvalidMessage("the storage agent sent an endless line")
            self._buffer += self._receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _receive(self) -> bytes:
        """What comes next; descriptors among it are kept. The kernel itself closes those over the expected number."""
        self._socket.settimeout(max(0.1, self._left_s()))
        room = socket.CMSG_LEN((_WITH_RING - len(self._fds)) * _INT_BYTES)
        # Not socket.recv_fds: it forgets its flags (Python 3.11).
        data, ancillary, flags, _ = self._socket.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array("i", content[: len(content) // _INT_BYTES * _INT_BYTES])
        if flags & socket.MSG_CTRUNC:
            raise LeaseDenied(f"the storage agent sent more than {_WITH_RING} descriptors")
        if not data:
            raise LeaseDenied("the storage agent closed the connection")
        return data

"""The lease on a model's files: a connection to the node's storage agent. Blocking: an engine cannot start without."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

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


class Lease:
    """Held from construction to close. Raises LeaseDenied: refused, agent unreachable, or not within timeout_s."""

    def __init__(self, socket_path: Path, *, model_id: str, instance_id: str, timeout_s: float) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        try:
            self._connect(socket_path)
            self._send(LeaseRequest(model_id=model_id, instance_id=instance_id))
            self.granted = self._await_grant()
        except OSError as error:
            self._socket.close()
            raise LeaseDenied(f"storage agent at {socket_path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def used(self, *, load_ms: float) -> None:
        """The engine has its own copy of the weights."""
        try:
            self._send(LeaseUsed(load_ms=load_ms, read_bytes=self.granted.total_bytes))
        except OSError:
            return  # an observation less; the agent restarted meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def _connect(self, path: Path) -> None:
        # A restarting agent is back within moments: its absence alone is no reason to fail a start.
        while True:
            try:
                self._socket.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
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
            self._socket.settimeout(max(0.1, self._left_s()))
            data = self._socket.recv(65536)
            if not data:
                raise LeaseDenied("the storage agent closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

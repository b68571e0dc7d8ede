"""Real NATS servers for tests: one for the session, and ones that a test may kill and start again.

Fixtures:
    nats_url     a URL of the session's server, with the event stream empty
    nats_server  a server of the test's own: `.url`, `.kill()`, `.start()`
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from stoker_cli.embedded.nats import EmbeddedNats
from stoker_contracts.subjects import EVENTS_STREAM

START_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Between fork and exec: no server outlives the test process, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class NatsServer:
    """A nats-server process on a port and directory of its own, with JetStream and a password."""

    def __init__(self, directory: Path) -> None:
        self._embedded = EmbeddedNats(directory, port=free_port(), user="test", password=secrets.token_hex(8))
        self._embedded.prepare()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self._embedded.url

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers. The port and the store are those of the last start."""
        assert self._process is None, "it runs already"
        self._process = subprocess.Popen(
            self._embedded.command, stdin=subprocess.DEVNULL, stderr=sys.stderr, preexec_fn=die_with_parent
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                log = self._embedded.log
                raise RuntimeError(f"nats-server did not start:\n{log.read_text() if log.exists() else '(no log)'}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._embedded.port), timeout=1.0) as link:
                return link.makefile("rb").readline().startswith(b"INFO ")
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. No-op if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """SIGTERM: an orderly shutdown."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(timeout=START_TIMEOUT_S)

    async def delete_events(self) -> None:
        """Delete the event stream, if there is one, and wait until it is gone from the disk.

        nats-server answers before that, and a stream made meanwhile gets the deleted messages back (seen with 2.15.1).
        """
        client = Client()
        await client.connect(self.url, allow_reconnect=False)
        try:
            await client.jetstream().delete_stream(EVENTS_STREAM)
        except NotFoundError:
            return
        finally:
            await client.close()
        streams = self._embedded.directory / "jetstream" / "jetstream" / "$G" / "streams"
        async with asyncio.timeout(START_TIMEOUT_S):
            while any(name.endswith(EVENTS_STREAM) for name in _names(streams)):
                await asyncio.sleep(0.002)

    def freeze(self) -> None:
        """The process stands still and its connections stay open, as on a machine that hangs."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def _names(directory: Path) -> list[str]:
    """What lies there; nothing, where nats-server has just removed it with its last stream."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


@pytest.fixture(scope="session")
def nats_session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def nats_url(nats_session_server: NatsServer) -> str:
    """A URL of a running server; no event of an earlier test is in its stream."""
    await nats_session_server.delete_events()
    return nats_session_server.url


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that belongs to this test alone, running, to be killed and started at will."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()

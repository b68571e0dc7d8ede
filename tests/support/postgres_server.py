"""A real PostgreSQL for tests: one server a session, one fresh migrated database a test."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from stoker_cli.embedded.postgres import EmbeddedPostgres
from stoker_db.migrate import upgrade

_START_S = 30.0
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine from anywhere, also from below a running event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PostgresServer:
    """A server that can be killed and started again on the same port and data."""

    def __init__(self, directory: Path) -> None:
        self._embedded = EmbeddedPostgres(directory / "data", port=free_port(), password="of the tests: @/%")
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Return once it answers. A killed server's children may hold its memory for a moment: tried until they are gone."""
        self._embedded.prepare()
        # A killed process loses nothing that the kernel has, so the tests spare the disk.
        command = [*self._embedded.command, "--fsync=off"]
        deadline_s = time.monotonic() + _START_S
        while True:
            if self._process is None or self._process.poll() is not None:
                with self._log.open("ab") as log:
                    self._process = subprocess.Popen(
                        command, stdout=log, stderr=log, preexec_fn=die_with_parent, **self._embedded.spawn_kwargs
                    )
            if _run(self._embedded.ready()):
                return
            assert time.monotonic() < deadline_s, f"PostgreSQL did not start:\n{self._log.read_text()[-2000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(self._embedded.stop_signal)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _end(self, number: int) -> None:
        if self._process is not None and self.running:
            os.kill(self._process.pid, number)
            self._process.wait(timeout=_START_S)
        self._process = None

    def url_of(self, database: str) -> str:
        return urlsplit(self._embedded.url)._replace(path=f"/{database}").geturl()

    def execute(self, *statements: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(self.url_of("postgres"))
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        _run(run())

    def create_database(self, template: str = "template0") -> str:
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop_database(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


class RestartableServer:
    """The session's server with a test's own database. Whatever the test leaves, the next test finds it running."""

    def __init__(self, server: PostgresServer, url: str) -> None:
        self._server = server
        self.url = url
        self.kill = server.kill
        self.start = server.start

    @property
    def pid(self) -> int:
        return self._server.pid


@pytest.fixture(scope="session")
def _postgres_session() -> Iterator[PostgresServer]:
    # Not pytest's own temporary folder: nobody but its owner may enter that, and as root the server is another account.
    directory = Path(tempfile.mkdtemp(prefix="stoker-test-postgres-"))
    server = PostgresServer(directory)
    try:
        server.start()
        server.execute("CREATE DATABASE migrated TEMPLATE template0")
        _run(upgrade(server.url_of("migrated")))
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def empty_postgres_url(_postgres_session: PostgresServer) -> Iterator[str]:
    """A database without any table."""
    name = _postgres_session.create_database()
    yield _postgres_session.url_of(name)
    _postgres_session.drop_database(name)


@pytest.fixture
def postgres_url(_postgres_session: PostgresServer) -> Iterator[str]:
    """A fresh, migrated, empty database."""
    name = _postgres_session.create_database("migrated")
    yield _postgres_session.url_of(name)
    if not _postgres_session.running:
        _postgres_session.start()
    _postgres_session.drop_database(name)


@pytest.fixture
def postgres_server(_postgres_session: PostgresServer, postgres_url: str) -> RestartableServer:
    """A server to kill and start, and the URL of a fresh, migrated, empty database on it."""
    return RestartableServer(_postgres_session, postgres_url)

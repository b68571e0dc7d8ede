"""`stoker up` as a real process: NATS, PostgreSQL and the four services, with the engine that needs no model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.support.tiny_model import write_tiny_model

STOKER = str(Path(sys.executable).with_name("stoker"))
START_S = 90.0
STOP_S = 60.0


class System:
    """`stoker up` in a home of its own."""

    def __init__(self, home: Path, **settings: str) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STOKER_")}
        self.home = home
        self.env = inherited | {
            "STOKER_HOME": str(home),
            "STOKER_UP_GATEWAY_PORT": "0",
            "STOKER_UP_NATS_PORT": "0",
            "STOKER_UP_POSTGRES_PORT": "0",
            "STOKER_UP_DEMO": "false",
            "STOKER_WORKER_ENGINES": "sim",
            **settings,
        }
        self.log = home.with_suffix(".out")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([STOKER, "up"], env=self.env, stdout=log, stderr=log)

    def output(self) -> str:
        return self.log.read_text()

    def wait_ready(self) -> str:
        """The gateway's URL."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"Stoker is ready at (\S+)", self.output()):
                return found.group(1)
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.output()}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([STOKER, *arguments], env=self.env, capture_output=True, text=True, timeout=60)

    def json(self, *arguments: str) -> dict[str, list[dict[str, object]]]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
        return answer

    def processes(self) -> list[psutil.Process]:
        """All that were started for this home, whoever their parent is now."""
        return [p for p in psutil.process_iter() if environment(p).get("STOKER_HOME") == str(self.home)]

    def until_gone(self) -> None:
        until = time.monotonic() + STOP_S
        while left := self.processes():
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(STOP_S)


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return {}
        return dict(process.environ())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


@pytest.fixture
def launch(home: Path) -> Iterator[Callable[..., System]]:
    """Start systems in one home; whatever a test leaves running is ended."""
    launched: list[System] = []

    def start(**settings: str) -> System:
        launched.append(System(home, **settings))
        return launched[-1]

    yield start
    for system in launched:
        system.end()


@pytest.fixture
def home() -> Iterator[Path]:
    # Sockets below the home have short names only: pytest's own directories may be too deep.
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        yield Path(folder) / "home"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        running = System(Path(folder) / "home")
        try:
            running.wait_ready()
            yield running
        finally:
            running.end()
        assert running.process.returncode == 0, running.output()


def test_six_processes_run_and_a_node_can_start_instances(system: System) -> None:
    names = {path.stem for path in (system.home / "logs").glob("*.log")}
    assert names == {"nats", "postgres", "storeagent", "worker", "scheduler", "gateway"}
    (node,) = system.json("nodes")["nodes"]
    assert node["zygote_ready"] is True
    assert node["devices"]


def test_what_is_private_is_readable_by_its_owner_only(system: System) -> None:
    for name in ("secrets.json", "run/endpoints.json"):
        assert (system.home / name).stat().st_mode & 0o777 == 0o600


def test_doctor_finds_nothing_wrong_and_shows_no_secret(system: System) -> None:
    done = system.run("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"]) == (0, [])
    assert set(report["settings"]) == {"up", "gateway", "scheduler", "worker", "storeagent"}
    assert report["settings"]["worker"]["STOKER_WORKER_ENGINES"] == "sim"
    assert report["settings"]["gateway"]["STOKER_GATEWAY_CLUSTER_SECRET"] == "***"
    secrets = json.loads((system.home / "secrets.json").read_text())
    for secret in secrets.values():
        assert secret not in done.stdout


def test_a_model_is_deployed_listed_answers_and_is_deleted(system: System, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "toy")
    done = system.run("deploy", str(tmp_path / "toy"), "--engine", "sim", "--slots", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("toy registered: LlamaForCausalLM")
    assert [model["name"] for model in system.json("models")["models"]] == ["toy"]

    said = system.run("chat", "toy", "hello", "--max-tokens", "5")
    assert said.returncode == 0, said.stderr
    assert "first token after" in said.stderr
    assert [(i["model"], i["state"]) for i in system.json("ps")["instances"]] == [("toy", "ready")]

    assert system.run("rm", "toy").returncode == 0
    assert system.json("models")["models"] == []
    assert system.run("rm", "toy").returncode == 1

    kinds = [json.loads(line)["type"] for line in system.run("events", "--no-follow", "--json").stdout.splitlines()]
    for kind in ("stoker.node.joined", "stoker.model.registered", "stoker.instance.ready", "stoker.model.deleted"):
        assert kind in kinds
    some = system.run("events", "--no-follow", "--filter", "model.*").stdout.splitlines()
    assert len(some) == 3, "registered, decided about, deleted"


def test_a_second_system_in_the_same_home_is_refused(system: System) -> None:
    done = system.run("up")
    assert done.returncode == 1
    assert f"(process {system.process.pid})" in done.stderr


@pytest.mark.parametrize(
    ("key", "option"), [("GATEWAY", "--gateway-port"), ("NATS", "--nats-port"), ("POSTGRES", "--postgres-port")]
)
def test_a_taken_port_is_named_before_anything_starts(
    home: Path, launch: Callable[..., System], key: str, option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        system = launch(**{f"STOKER_UP_{key}_PORT": str(port)})
        assert system.process.wait(60) == 1
    assert f"port {port} " in system.output()
    assert f"{option} or STOKER_UP_{key}_PORT" in system.output()
    assert list((home / "logs").iterdir()) == []


def test_settings_that_a_service_refuses_end_the_start_and_are_shown(launch: Callable[..., System]) -> None:
    system = launch(STOKER_GATEWAY_PROT="1")
    assert system.process.wait(START_S) == 1
    assert "unknown setting STOKER_GATEWAY_PROT" in system.output()
    system.until_gone()


def test_ctrl_c_stops_all_and_the_next_start_keeps_what_was(
    home: Path, launch: Callable[..., System], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "toy")
    first = launch()
    first.wait_ready()
    done = first.run("deploy", str(tmp_path / "toy"), "--engine", "sim")
    assert done.returncode == 0, done.stderr
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(STOP_S) == 0
    assert first.processes() == []
    assert not (home / "run" / "endpoints.json").exists()
    first.log.unlink()
    second = launch()
    second.wait_ready()
    assert [model["name"] for model in second.json("models")["models"]] == ["toy"]


def test_kill_9_leaves_nothing_behind_and_the_next_start_works(launch: Callable[..., System]) -> None:
    system = launch()
    url = system.wait_ready()
    assert len(system.processes()) >= 7
    system.process.kill()
    system.process.wait()
    system.log.unlink()
    # At once, on the same port: the new one waits until the old servers have let go.
    again = launch(STOKER_UP_GATEWAY_PORT=url.rpartition(":")[2])
    assert again.wait_ready() == url
    again.process.kill()
    again.process.wait()
    again.until_gone()

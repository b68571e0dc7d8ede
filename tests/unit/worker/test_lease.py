"""The instance's end of a lease: descriptors arrive with the grant, and none is ever left over."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stoker_contracts.codec import decode, encode
from stoker_contracts.models import Tier
from stoker_contracts.storage import LeaseGranted, LeaseProgress, LeaseRefused, LeaseRequest, LeaseUsed
from stoker_core.errors import InvalidMessage, LeaseDenied
from stoker_worker.instance.lease import Lease

GRANT = encode(LeaseGranted(path="/models/m", source=Tier.SSD, total_bytes=7, wait_ms=0.5)) + b"\n"
RING_GRANT = encode(LeaseGranted(path="/models/m", source=Tier.SSD, total_bytes=7, wait_ms=0.5, ring=True)) + b"\n"
PROGRESS = encode(LeaseProgress(done_bytes=1, total_bytes=7)) + b"\n"
WAIT_S = 10.0


class Agent:
    """One connection of a storage agent that follows a script, in a thread; `heard` is what the instance said."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "store.sock"
        self.heard = b""
        self.files = [tempfile.TemporaryFile() for _ in range(5)]  # noqa: SIM115
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread: threading.Thread | None = None

    def play(self, script: Callable[[socket.socket], None], *, then_listen: bool = True) -> None:
        def run() -> None:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(WAIT_S)
                while not self.heard.endswith(b"\n"):
                    self.heard += connection.recv(4096)
                script(connection)
                with contextlib.suppress(ConnectionResetError):  # it left without reading all
                    while then_listen and (data := connection.recv(4096)):
                        self.heard += data

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def send(self, connection: socket.socket, data: bytes, descriptors: int) -> None:
        fds = array.array("i", [file.fileno() for file in self.files[:descriptors]])
        connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    def grant(self, connection: socket.socket) -> None:
        self.send(connection, GRANT, 2)

    def joined(self) -> list[bytes]:
        """The lines that it heard, once the connection is over."""
        assert self._thread
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.heard.splitlines()

    def close(self) -> None:
        self._listener.close()
        for file in self.files:
            file.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    agent.close()


def lease(agent: Agent, timeout_s: float = WAIT_S, device: str = "") -> Lease:
    return Lease(agent.path, model_id="m", instance_id="i", timeout_s=timeout_s, device=device)


def open_descriptors() -> set[str]:
    return {target for fd in os.listdir("/proc/self/fd") if (target := _target(fd))}


def _target(fd: str) -> str:
    try:
        return f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}"
    except FileNotFoundError:  # the listing's own
        return ""


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_a_grant_brings_the_pool_and_the_board_and_no_program_that_is_started_inherits_them(agent: Agent) -> None:
    agent.play(agent.grant)
    with lease(agent) as held:
        assert held.path == Path("/models/m")
        assert [inode(held.pool_fd), inode(held.board_fd)] == [inode(file.fileno()) for file in agent.files[:2]]
        assert not any(os.get_inheritable(fd) for fd in (held.pool_fd, held.board_fd, held.fileno()))
        assert held.alive()
        assert (held.ring_fd, held.ring_board_fd) == (-1, -1)
    assert not held.alive()
    (request,) = agent.joined()
    assert decode(LeaseRequest, request) == LeaseRequest(model_id="m", instance_id="i", device="")


def test_a_grant_with_a_ring_brings_its_descriptors_too_and_they_end_with_the_lease(agent: Agent) -> None:
    before = open_descriptors()
    agent.play(lambda connection: agent.send(connection, RING_GRANT, 4))
    with lease(agent, device="GPU-1") as held:
        fds = [held.pool_fd, held.board_fd, held.ring_fd, held.ring_board_fd]
        assert [inode(fd) for fd in fds] == [inode(file.fileno()) for file in agent.files[:4]]
        assert not any(map(os.get_inheritable, fds))
    (request,) = agent.joined()
    assert decode(LeaseRequest, request).device == "GPU-1"
    assert open_descriptors() == before


def test_descriptors_are_found_however_the_line_is_cut(agent: Agent) -> None:
    def in_pieces(connection: socket.socket) -> None:
        for at in range(len(PROGRESS)):
            connection.sendall(PROGRESS[at : at + 1])
        agent.send(connection, GRANT[:1], 2)
        for at in range(1, len(GRANT)):
            connection.sendall(GRANT[at : at + 1])

    agent.play(in_pieces)
    with lease(agent) as held:
        assert [inode(held.pool_fd), inode(held.board_fd)] == [inode(file.fileno()) for file in agent.files[:2]]
    agent.joined()


def test_a_used_lease_is_over_and_leaves_nothing_open(agent: Agent) -> None:
    before = open_descriptors()
    agent.play(agent.grant)
    held = lease(agent)
    held.used(load_ms=12.5)
    held.used(load_ms=99.0)
    _, used = agent.joined()
    assert decode(LeaseUsed, used) == LeaseUsed(load_ms=12.5, read_bytes=7)
    assert open_descriptors() == before


def test_a_lease_is_dead_as_soon_as_its_agent_is(agent: Agent) -> None:
    agent.play(agent.grant, then_listen=False)
    with lease(agent) as held:
        agent.joined()
        assert not held.alive()
        held.used(load_ms=1.0)


@pytest.mark.parametrize(
    ("grant", "descriptors"), [(GRANT, 0), (GRANT, 1), (GRANT, 3), (GRANT, 4), (RING_GRANT, 2), (RING_GRANT, 5)]
)
def test_a_grant_with_another_number_of_descriptors_is_refused(agent: Agent, grant: bytes, descriptors: int) -> None:
    before = open_descriptors()
    agent.play(lambda connection: agent.send(connection, grant, descriptors))
    with pytest.raises(LeaseDenied, match="descriptors"):
        lease(agent)
    agent.joined()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (encode(LeaseRefused(code="tier_full", message="no room")) + b"\n", LeaseDenied),
        (b"{}\n", InvalidMessage),
        (b"x" * 100_000, InvalidMessage),
        (GRANT[:-1], LeaseDenied),
    ],
    ids=["refused", "nonsense", "endless", "cut off"],
)
def test_descriptors_that_came_with_anything_else_are_closed(agent: Agent, line: bytes, error: type[Exception]) -> None:
    before = open_descriptors()

    def answer(connection: socket.socket) -> None:
        agent.send(connection, line[:1], 2)
        connection.sendall(line[1:])
        connection.shutdown(socket.SHUT_WR)

    agent.play(answer)
    with pytest.raises(error):
        lease(agent)
    agent.joined()
    assert open_descriptors() == before


def test_an_agent_that_does_not_answer_in_time_denies(agent: Agent) -> None:
    before = open_descriptors()
    agent.play(lambda connection: agent.send(connection, GRANT[:1], 2))
    with pytest.raises(LeaseDenied):
        lease(agent, timeout_s=0.1)
    agent.joined()
    assert open_descriptors() == before


def test_an_agent_too_busy_to_accept_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "store.sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = waiting.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(path))
        outcome: list[BaseException] = []

        def take() -> None:
            try:
                Lease(path, model_id="m", instance_id="i", timeout_s=0.2)
            except LeaseDenied as error:
                outcome.append(error)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(WAIT_S)
        assert len(outcome) == 1

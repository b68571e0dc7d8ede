import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.descriptors import descriptors_before, descriptors_open

from stoker_core.errors import InvalidMessage, InvalidSettings
from stoker_core.unix import PATH_BYTES_MAX, Connection, accept, close, listen

LINE_BYTES_MAX = 64 * 1024
LINE = b"x" * 40_000


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """Our end, and the other one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(ours, line_bytes_max=LINE_BYTES_MAX, descriptors_max=2)
    yield connection, theirs
    connection.close()
    theirs.close()


def receive(client: socket.socket, size_bytes: int) -> tuple[bytes, list[int]]:
    data, descriptors = b"", []
    while len(data) < size_bytes:
        more, came, _, _ = socket.recv_fds(client, 1 << 20, 8)
        data += more
        descriptors += came
    return data, descriptors


async def test_lines_come_one_by_one_however_they_were_sent(pair: tuple[Connection, socket.socket]) -> None:
    connection, client = pair
    client.sendall(b"one\ntw")
    assert await connection.line() == b"one\n"
    client.sendall(b"o\n\nhalf")
    client.shutdown(socket.SHUT_WR)
    assert [await connection.line() for _ in range(3)] == [b"two\n", b"\n", b""]


@pytest.mark.parametrize("size", [LINE_BYTES_MAX + 1, LINE_BYTES_MAX + 100_000])
async def test_a_line_over_the_limit_is_refused(pair: tuple[Connection, socket.socket], size: int) -> None:
    connection, client = pair
    sending = asyncio.create_task(asyncio.to_thread(client.sendall, b"x" * size + b"\n"))
    with pytest.raises(InvalidMessage, match="longer than"):
        await connection.line()
    connection.close()
    await asyncio.wait([sending])


async def test_descriptors_come_with_their_message_to_a_client_that_reads_late(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, client = pair
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += connection._socket.send(b"." * 1000)
    reading, writing = os.pipe()
    sending = asyncio.create_task(connection.send(LINE, [reading, writing]))
    await asyncio.sleep(0)
    assert not sending.done(), "the socket is full"
    expected = LINE + b"\n"
    data, descriptors = await asyncio.to_thread(receive, client, filled + len(expected))
    await sending
    assert data[filled:] == expected
    os.write(descriptors[1], b"x")
    assert os.read(reading, 1) == b"x"
    for descriptor in (reading, writing, *descriptors):
        os.close(descriptor)


async def test_a_client_that_has_all_it_wants_may_leave_before_we_look(
    pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, client = pair
    send_fds = socket.send_fds

    def and_leave(*arguments: object) -> int:
        sent: int = send_fds(*arguments)  # type: ignore[arg-type]
        client.sendall(b"used\n")
        client.recv(1 << 20)
        client.close()
        return sent

    monkeypatch.setattr(socket, "send_fds", and_leave)
    await connection.send(b"refused", [0])
    assert await connection.line() == b"used\n"
    assert await connection.line() == b""


async def test_a_client_that_left_is_noticed(pair: tuple[Connection, socket.socket]) -> None:
    connection, client = pair
    connection.check()
    client.sendall(b"x")
    connection.check()
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection._socket, 1), 1) == b"x"
    client.close()
    with pytest.raises(ConnectionResetError):
        connection.check()


async def test_descriptors_that_come_are_those_of_the_line_and_close_on_exec(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, client = pair
    reading, writing = os.pipe()
    socket.send_fds(client, [b"on"], [reading, writing])
    client.sendall(b"e\ntwo\n")
    assert await connection.line() == b"one\n"
    ours = connection.descriptors()
    assert connection.descriptors() == ()
    assert not any(os.get_inheritable(descriptor) for descriptor in ours)
    os.write(ours[1], b"x")
    assert os.read(reading, 1) == b"x"
    assert await connection.line() == b"two\n"
    for descriptor in (reading, writing, *ours):
        os.close(descriptor)


@pytest.mark.parametrize("batches", [[3], [2, 1], [1, 2]])
async def test_more_descriptors_than_may_come_are_refused_and_none_stays_open(
    pair: tuple[Connection, socket.socket], batches: list[int]
) -> None:
    connection, client = pair
    before = descriptors_before()
    for batch in batches:
        socket.send_fds(client, [b"half a line"], [0] * batch)
    with pytest.raises(InvalidMessage, match="more descriptors"):
        await connection.line()
    connection.close()
    assert descriptors_open() == before - 1


async def test_descriptors_that_nobody_fetches_close_with_the_connection(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, client = pair
    before = descriptors_before()
    socket.send_fds(client, [b"line\n"], [0, 0])
    assert await connection.line() == b"line\n"
    assert descriptors_open() == before + 2
    connection.close()
    assert descriptors_open() == before - 1


async def test_a_reader_that_is_cancelled_leaves_nothing_behind(pair: tuple[Connection, socket.socket]) -> None:
    connection, client = pair
    waiting = asyncio.create_task(connection.line())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    client.sendall(b"later\n")
    assert await connection.line() == b"later\n"


async def test_only_this_user_may_connect_and_who_does_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.sock"
    listener = listen(path, setting="S", who="one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        (await accept(listener)).close()
    with pytest.raises(InvalidSettings, match="S: another one listens"):
        listen(path, setting="S", who="one")
    close(listener)
    assert not path.exists()


async def test_accepting_goes_on_once_there_are_descriptors_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen(tmp_path / "s.sock", setting="S", who="one")
    loop, accepting = asyncio.get_running_loop(), asyncio.get_running_loop().sock_accept
    fails = iter([True])

    async def full_once(of: socket.socket) -> object:
        if next(fails, False):
            raise OSError(24, "Too many open files")
        return await accepting(of)

    monkeypatch.setattr(loop, "sock_accept", full_once)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s.sock"))
        (await accept(listener)).close()
    close(listener)


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("x" * PATH_BYTES_MAX)
    with pytest.raises(InvalidSettings, match=r"S: .* has more than the 107 bytes"):
        listen(path, setting="S", who="one")

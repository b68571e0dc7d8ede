import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from stoker_contracts.codec import encode
from stoker_contracts.storage import LINE_LIMIT_BYTES, LeaseRefused
from stoker_core.errors import InvalidMessage
from stoker_storeagent.connection import Connection

MESSAGE = LeaseRefused(code="code", message="x" * 40_000)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """The agent's end, and the client's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(ours)
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


@pytest.mark.parametrize("size", [LINE_LIMIT_BYTES + 1, LINE_LIMIT_BYTES + 100_000])
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
    sending = asyncio.create_task(connection.send(MESSAGE, [reading, writing]))
    await asyncio.sleep(0)
    assert not sending.done(), "the socket is full"
    expected = encode(MESSAGE) + b"\n"
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
    await connection.send(LeaseRefused(code="c", message="m"), [0])
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

"""Two storage agents' ends of a connection, on real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.support.buses import eventually

from stoker_bus.memory import MemoryBroker
from stoker_contracts.control import Located
from stoker_contracts.events import TIER_PEER_SUSPECTED
from stoker_core.clock import Clock, ManualClock, SystemClock
from stoker_core.errors import InvalidSettings, NotHeld, PeerFailed, PortTaken, StorageFailed
from stoker_storeagent.peers import sockets
from stoker_storeagent.peers.client import READS_PER_PEER, PeerClient
from stoker_storeagent.peers.server import HANDSHAKES_MAX, PeerServer
from stoker_storeagent.peers.wire import Auth, ClientSide, Denied, Have, ServerSide, Want, Welcome
from stoker_storeagent.ports import ServedChunk
from stoker_storeagent.throttle import BURST_S, Throttle

TOKEN = "a token of the cluster"
MIB = 1024 * 1024
SIZE = 3 * MIB + 4096 + 7


class Shelf:
    """Chunks in one file, by position; `held` says how often each is in use."""

    def __init__(self, fd: int) -> None:
        self.fd, self.held = fd, dict[int, int]()
        self.waiting = 0
        self.digest = "xxh3_128:1234"
        self.claimed_bytes = SIZE
        self._changed = asyncio.Condition()
        self._bytes: dict[int, bytes] = {}

    async def put(self, position: int) -> bytes:
        data = os.urandom(SIZE)
        os.pwrite(self.fd, data, position * 4 * MIB)
        async with self._changed:
            self._bytes[position] = data
            self._changed.notify_all()
        return data

    @asynccontextmanager
    async def chunk(self, model_id: str, position: int, *, wait_s: float) -> AsyncIterator[ServedChunk]:
        if model_id == "broken":
            raise StorageFailed("chunk", "the disk is broken")
        self.waiting += 1
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: model_id == "m" and position in self._bytes)
        except TimeoutError as error:
            raise NotHeld(f"chunk {position} is not here") from error
        finally:
            self.waiting -= 1
        self.held[position] = self.held.get(position, 0) + 1
        try:
            yield ServedChunk(
                fd=self.fd, offset_bytes=position * 4 * MIB, size_bytes=self.claimed_bytes, digest=self.digest
            )
        finally:
            self.held[position] -= 1

    def located(self, model_id: str) -> Located | None:
        return None


class Emitted:
    def __init__(self) -> None:
        self.events: list[tuple[tuple[str, str], str]] = []

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.events.append((event, subject))


async def nowhere(model_id: str) -> list[str]:
    return []


class Rig:
    """Starts servers and clients, and ends them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.clock: Clock = SystemClock()
        self.events, self.tasks = Emitted(), dict[PeerServer, asyncio.Task[None]]()
        fd = os.memfd_create("shelf")
        stack.callback(os.close, fd)
        self.shelf = Shelf(fd)

    async def serve(self, *, node: str = "a", throttle: Throttle | None = None, **settings: Any) -> PeerServer:
        server = PeerServer(
            self.shelf,
            **({"node": node, "token": TOKEN, "host": "127.0.0.1", "port": 0, "clock": self.clock} | settings),
            throttle=throttle or Throttle(0, self.clock),
        )
        server.listen()
        self.tasks[server] = self.running(server.part().run)
        return server

    def running(self, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def awaited() -> None:
            await run()

        task = asyncio.create_task(awaited())
        self._stack.push_async_callback(stopped, task)
        return task

    def client(self, *, token: str = TOKEN, throttle: Throttle | None = None, **settings: Any) -> PeerClient:
        client = PeerClient(
            MemoryBroker().connect(),
            nowhere,
            self.events,
            **({"node": "b", "token": token, "clock": self.clock, "stall_s": 5.0, "wait_s": 5.0} | settings),
            throttle=throttle or Throttle(0, self.clock),
        )
        self.running(client.part().run)
        return client

    async def peer(self, speak: Callable[[Peer], Awaitable[None]]) -> Located:
        """A peer that says what `speak` says."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        self._stack.callback(listener.close)

        async def run() -> None:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                with connection, suppress(OSError):
                    await speak(Peer(connection))

        self.running(run)
        return at(f"127.0.0.1:{listener.getsockname()[1]}")

    async def raw(self, server: PeerServer) -> Raw:
        raw = await Raw.connect(server.address)
        self._stack.callback(raw.connection.close)
        return raw


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class Peer:
    """The server's end of a connection, done by hand."""

    def __init__(self, connection: socket.socket, token: str = TOKEN) -> None:
        connection.setblocking(False)
        self.connection, self.side = connection, ServerSide(node="a", token=token, nonce=os.urandom(32))

    async def welcome(self) -> None:
        await self.say(self.side.hello())
        assert isinstance(await self.hear(), Auth)
        await self.say(self.side.welcome())

    async def hear(self) -> Auth | Denied | Want | object:
        return await sockets.next_message(self.connection, self.side)

    async def say(self, data: bytes) -> None:
        await sockets.send(self.connection, data, stall_s=5)


class Raw:
    """The client's end of a connection, done by hand."""

    def __init__(self, connection: socket.socket, node: str = "b") -> None:
        self.connection = connection
        self.side = ClientSide(node=node, peer="a", token=TOKEN, nonce=os.urandom(32))
        self.auth = b""

    @classmethod
    async def connect(cls, address: str) -> Raw:
        host, _, port = address.rpartition(":")
        connection = socket.socket()
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        return cls(connection)

    async def hear(self) -> object:
        return await sockets.next_message(self.connection, self.side)

    async def say(self, data: bytes) -> None:
        await sockets.send(self.connection, data, stall_s=5)

    async def introduce(self) -> Raw:
        auth = await self.hear()
        assert isinstance(auth, bytes)
        self.auth = auth
        await self.say(auth)
        assert isinstance(await self.hear(), Welcome)
        return self

    async def want(self, position: int) -> None:
        await self.say(self.side.want(Want(model_id="m", position=position, wait_ms=5000)))

    async def have(self) -> None:
        assert isinstance(await self.hear(), Have)

    async def body(self) -> bytes:
        into = bytearray(SIZE)
        await sockets.receive_into(
            self.connection, memoryview(into), lambda _: None, throttle=Throttle(0, SystemClock()), stall_s=5
        )
        return bytes(into)

    async def ended(self) -> bool:
        """Whether the server hangs up, without another word."""
        async with asyncio.timeout(10):
            try:
                return await asyncio.get_running_loop().sock_recv(self.connection, 1) == b""
            except ConnectionResetError:
                return True


def at(address: str, node: str = "a") -> Located:
    return Located(node=node, address=address, held_bytes=1, total_bytes=1)


async def get(client: PeerClient, located: Located, position: int = 0, offset: int = 0) -> bytes:
    into = bytearray(SIZE - offset)
    await client.read(located, "m", position, offset, memoryview(into), lambda _: None)
    return bytes(into)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(stack)


# Chunks.


async def test_a_chunk_comes_into_the_memory_that_is_given_and_nowhere_else(rig: Rig) -> None:
    server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(2)
    memory, told = bytearray(b"." * (SIZE + 20)), list[int]()
    digest = await client.read(at(server.address), "m", 2, 0, memoryview(memory)[10 : SIZE + 10], told.append)
    assert bytes(memory[10 : SIZE + 10]) == data
    assert memory[:10] == memory[-10:] == b"." * 10
    assert digest == rig.shelf.digest
    assert told == sorted(set(told))
    assert told[-1] == SIZE


async def test_a_chunk_goes_on_where_it_broke_off(rig: Rig) -> None:
    server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(1)
    assert await get(client, at(server.address), 1, MIB + 3) == data[MIB + 3 :]


async def test_a_chunk_on_its_way_is_waited_for(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    reading = asyncio.create_task(get(client, at(server.address), 3))
    await eventually(lambda: rig.shelf.waiting == 1)
    assert server.serving == 1
    data = await rig.shelf.put(3)
    assert await reading == data


async def test_a_chunk_that_does_not_come_in_time_is_not_held_and_the_peer_not_suspected(rig: Rig) -> None:
    server, client, data = await rig.serve(), rig.client(wait_s=0.05), await rig.shelf.put(0)
    with pytest.raises(NotHeld, match="chunk 9 is not here"):
        await get(client, at(server.address), 9)
    assert client.suspected == frozenset()
    assert await get(client, at(server.address), 0) == data


async def test_a_client_that_leaves_is_not_waited_for(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client(wait_s=60.0)
    reading = asyncio.create_task(get(client, at(server.address), 9))
    await eventually(lambda: rig.shelf.waiting == 1)
    reading.cancel()
    await eventually(lambda: rig.shelf.waiting == 0)
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_many_chunks_at_once_do_not_mix(rig: Rig) -> None:
    server, clients = await rig.serve(), [rig.client(), rig.client(node="c")]
    chunks = [await rig.shelf.put(position) for position in range(6)]
    got = await asyncio.gather(*(get(client, at(server.address), n) for client in clients for n in range(6)))
    assert got == chunks * 2
    assert server.serving == 2, "two nodes, whatever the number of their connections"
    await eventually(lambda: set(rig.shelf.held.values()) == {0})


async def test_chunks_of_one_peer_come_a_few_at_a_time_in_the_order_of_asking(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    reads = [asyncio.create_task(get(client, at(server.address), position)) for position in range(5)]
    for position in range(5):
        asked = min(READS_PER_PEER, len(reads) - position)
        await eventually(partial(lambda asked: rig.shelf.waiting == asked, asked))
        data = await rig.shelf.put(position)
        assert await reads[position] == data


async def test_who_waits_for_a_peer_hears_at_once_that_it_failed(rig: Rig) -> None:
    asked = 0

    async def speak(peer: Peer) -> None:
        nonlocal asked
        await peer.welcome()
        await peer.hear()
        asked += 1

    client, located = rig.client(), await rig.peer(speak)
    outcomes = await asyncio.gather(*(get(client, located, at) for at in range(6)), return_exceptions=True)
    assert all(isinstance(outcome, PeerFailed) for outcome in outcomes)
    assert asked <= READS_PER_PEER


async def test_what_was_read_from_each_peer_is_counted(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    await rig.shelf.put(0)
    for _ in range(2):
        await get(client, at(server.address))
    [link] = client.links()
    assert (link.peer, link.read_bytes) == ("a", 2 * SIZE)
    assert link.read_bytes_per_s > 0


async def test_a_chunk_is_given_from_a_file_on_a_disk_too(rig: Rig, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "chunks", os.O_RDWR | os.O_CREAT)
    rig.shelf.fd, memory = fd, rig.shelf.fd
    try:
        server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(1)
        assert await get(client, at(server.address), 1) == data
    finally:
        rig.shelf.fd = memory
        os.close(fd)


async def test_files_that_sendfile_refuses_are_given_all_the_same(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> int:
        raise OSError(22, "as hugetlbfs does")

    monkeypatch.setattr(os, "sendfile", refused)
    server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(1)
    assert await get(client, at(server.address), 1, 5) == data[5:]


async def test_no_more_comes_than_the_bound_on_bandwidth_allows(rig: Rig) -> None:
    clock = ManualClock()
    rate, told = MIB, list[int]()
    server = await rig.serve(throttle=Throttle(rate, clock))
    client, data = rig.client(stall_s=60.0), await rig.shelf.put(0)
    into = bytearray(SIZE)
    reading = asyncio.create_task(client.read(at(server.address), "m", 0, 0, memoryview(into), told.append))
    while not reading.done():
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert (told[-1] if told else 0) <= rate * (clock.monotonic_s() + BURST_S)
        clock.advance(0.2)
    assert into == data
    assert clock.monotonic_s() == pytest.approx(SIZE / rate, abs=0.5)


async def test_the_bound_on_what_comes_in_holds_by_itself(rig: Rig) -> None:
    clock = ManualClock()
    rate, told = MIB, list[int]()
    server = await rig.serve()
    client, data = rig.client(throttle=Throttle(rate, clock)), await rig.shelf.put(0)
    into = bytearray(SIZE)
    reading = asyncio.create_task(client.read(at(server.address), "m", 0, 0, memoryview(into), told.append))
    while not reading.done():
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert (told[-1] if told else 0) <= rate * (clock.monotonic_s() + BURST_S)
        clock.advance(0.2)
    assert into == data


# How long a chunk is held.


@pytest.mark.parametrize("how", ["taken", "next want", "end"])
async def test_a_chunk_is_held_until_its_receiver_has_it(rig: Rig, how: str) -> None:
    server, data = await rig.serve(), await rig.shelf.put(0)
    raw = await (await rig.raw(server)).introduce()
    await raw.want(0)
    await raw.have()
    assert await raw.body() == data
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert rig.shelf.held[0] == 1, "the kernel may refer to it still"
    if how == "taken":
        await raw.say(raw.side.taken())
    elif how == "next want":
        await raw.want(9)
    else:
        raw.connection.close()
    await eventually(lambda: rig.shelf.held[0] == 0)


async def test_a_receiver_that_takes_nothing_is_cut_and_its_chunk_let_go(rig: Rig) -> None:
    server = await rig.serve(stall_s=0.2)
    await rig.shelf.put(0)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    slow.setblocking(False)
    host, _, port = server.address.rpartition(":")
    await asyncio.get_running_loop().sock_connect(slow, (host, int(port)))
    raw = await Raw(slow).introduce()
    await raw.want(0)
    await eventually(lambda: rig.shelf.held.get(0) == 1)
    await eventually(lambda: rig.shelf.held[0] == 0)
    slow.close()


async def test_a_receiver_that_says_nothing_more_is_cut_too(rig: Rig) -> None:
    server = await rig.serve(stall_s=0.2)
    await rig.shelf.put(0)
    raw = await (await rig.raw(server)).introduce()
    await raw.want(0)
    await raw.have()
    await raw.body()
    assert await raw.ended()
    assert rig.shelf.held[0] == 0


async def test_a_cancelled_read_lets_the_chunk_go_and_writes_no_more(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    data = await rig.shelf.put(0)
    into, some = bytearray(SIZE), asyncio.Event()
    reading = asyncio.create_task(client.read(at(server.address), "m", 0, 0, memoryview(into), lambda _: some.set()))
    await some.wait()
    reading.cancel()
    await asyncio.wait([reading])
    before = bytes(into)
    assert await get(client, at(server.address)) == data
    assert bytes(into) == before
    await eventually(lambda: rig.shelf.held[0] == 0)


# Peers that fail.


async def test_a_peer_that_dies_in_a_chunk_has_failed(rig: Rig) -> None:
    async def speak(peer: Peer) -> None:
        await peer.welcome()
        await peer.hear()
        await peer.say(peer.side.have(SIZE, "") + b"x" * 1000)

    located, client, told = await rig.peer(speak), rig.client(), list[int]()
    with pytest.raises(PeerFailed, match="left after 1000 of"):
        await client.read(located, "m", 0, 0, memoryview(bytearray(SIZE)), told.append)
    assert told[-1] == 1000, "who asks may go on from there"
    assert client.suspected == {"a"}
    assert rig.events.events == [(TIER_PEER_SUSPECTED, "a")]


@pytest.mark.parametrize("after", ["nothing", "hello", "welcome", "have"])
async def test_a_peer_that_stalls_has_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    monkeypatch.setattr("stoker_storeagent.peers.link.CONNECT_S", 0.3)

    async def speak(peer: Peer) -> None:
        if after == "hello":
            await peer.say(peer.side.hello())
        elif after != "nothing":
            await peer.welcome()
            await peer.hear()
        if after == "have":
            await peer.say(peer.side.have(SIZE, "") + b"x" * 1000)
        await asyncio.sleep(60)

    located, client = await rig.peer(speak), rig.client(stall_s=0.2, wait_s=0.1)
    with pytest.raises(PeerFailed, match=r"nothing came|no answer"):
        await get(client, located)
    assert client.suspected == {"a"}


async def test_a_peer_that_offers_another_size_has_failed_before_a_byte_is_taken(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    await rig.shelf.put(0)
    rig.shelf.claimed_bytes = SIZE - 1
    with pytest.raises(PeerFailed, match=f"offers {SIZE - 1} bytes where {SIZE} belong"):
        await get(client, at(server.address))


async def test_a_peer_whose_file_is_shorter_than_it_says_breaks_off(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    await rig.shelf.put(0)
    os.ftruncate(rig.shelf.fd, SIZE - 1000)
    with pytest.raises(PeerFailed):
        await get(client, at(server.address))
    await eventually(lambda: rig.shelf.held[0] == 0)


async def test_a_peer_that_cannot_read_its_disk_has_failed_and_serves_on(rig: Rig) -> None:
    server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(0)
    with pytest.raises(PeerFailed, match="the disk is broken"):
        await client.read(at(server.address), "broken", 0, 0, memoryview(bytearray(SIZE)), lambda _: None)
    assert await get(client, at(server.address)) == data


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:port", ""])
async def test_a_peer_that_cannot_be_reached_has_failed(rig: Rig, address: str) -> None:
    with pytest.raises(PeerFailed):
        await get(rig.client(), at(address))


async def test_another_node_at_a_peers_address_has_failed(rig: Rig) -> None:
    server = await rig.serve(node="z")
    with pytest.raises(PeerFailed, match="z answers in its place"):
        await get(rig.client(), at(server.address))


async def test_a_peer_that_was_started_anew_is_read_from_without_suspicion(rig: Rig) -> None:
    server, client, data = await rig.serve(), rig.client(), await rig.shelf.put(0)
    located = at(server.address)
    await asyncio.gather(get(client, located), get(client, located))  # two connections are kept
    await stopped(rig.tasks[server])
    await rig.serve(port=int(located.address.rpartition(":")[2]))
    assert await get(client, located) == data
    assert client.suspected == frozenset()


async def test_a_connection_that_the_peer_gave_up_is_replaced(rig: Rig) -> None:
    server, client, data = await rig.serve(idle_s=0.05), rig.client(), await rig.shelf.put(0)
    for _ in range(3):
        assert await get(client, at(server.address)) == data
        await asyncio.sleep(0.1)
    assert client.suspected == frozenset()


async def test_one_connection_serves_for_chunk_after_chunk(rig: Rig) -> None:
    accepted = 0

    async def speak(peer: Peer) -> None:
        nonlocal accepted
        accepted += 1
        await peer.welcome()
        while True:
            if isinstance(await peer.hear(), Want):
                await peer.say(peer.side.have(SIZE, "") + bytes(SIZE))

    located, client = await rig.peer(speak), rig.client()
    for _ in range(3):
        await get(client, located)
    assert accepted == 1


# Strangers.


async def test_a_client_with_another_token_gets_nothing(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client(token="another")
    await rig.shelf.put(0)
    with capture_logs() as lines, pytest.raises(PeerFailed, match="unauthenticated"):
        await get(client, at(server.address))
    assert rig.shelf.held == {}
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["peer_cut", "peer_suspected"]


async def test_a_server_with_another_token_is_believed_nothing(rig: Rig) -> None:
    async def speak(peer: Peer) -> None:
        impostor = Peer(peer.connection, token="another")
        await impostor.say(impostor.side.hello())
        await impostor.hear()
        impostor.side.client = "b"  # it does not care
        await impostor.say(impostor.side.welcome())
        await asyncio.sleep(60)

    with pytest.raises(PeerFailed, match="does not know the cluster's token"):
        await get(rig.client(), await rig.peer(speak))


async def test_what_one_connection_proved_is_worth_nothing_on_another(rig: Rig) -> None:
    server = await rig.serve()
    proven = await (await rig.raw(server)).introduce()
    other = await rig.raw(server)
    await other.hear()
    await other.say(proven.auth)
    with pytest.raises(PeerFailed, match="unauthenticated"):
        await other.hear()
    assert await other.ended()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\xff" * 5000, (5).to_bytes(4, "big") + b"hello", b"\x00\x00\x00\x00"],
)
async def test_garbage_is_cut_and_logged_once_and_others_go_on(rig: Rig, data: bytes) -> None:
    server, client, chunk = await rig.serve(), rig.client(), await rig.shelf.put(0)
    with capture_logs() as lines:
        for _ in range(3):
            raw = await rig.raw(server)
            await raw.hear()
            await raw.say(data)
            assert await raw.ended()
            assert await get(client, at(server.address)) == chunk
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["peer_cut"]


async def test_a_client_that_does_not_say_who_it_is_is_cut(rig: Rig) -> None:
    server = await rig.serve(handshake_s=0.1)
    raw = await rig.raw(server)
    await raw.hear()
    assert await raw.ended()


async def test_strangers_that_say_nothing_keep_no_peer_out(rig: Rig) -> None:
    server, client, chunk = await rig.serve(), rig.client(), await rig.shelf.put(0)
    strangers = [await rig.raw(server) for _ in range(HANDSHAKES_MAX + 10)]
    assert await get(client, at(server.address)) == chunk
    await strangers[0].hear()
    assert await strangers[0].ended(), "the oldest had to go"


async def test_a_peer_beyond_the_limit_is_sent_elsewhere_and_the_others_are_served(rig: Rig) -> None:
    server, client = await rig.serve(connections_max=2), rig.client()
    busy = [await (await rig.raw(server)).introduce() for _ in range(2)]
    for raw in busy:
        await raw.want(5)
    await eventually(lambda: rig.shelf.waiting == 2)
    with pytest.raises(NotHeld, match="is full"):
        await get(client, at(server.address))
    assert client.suspected == frozenset()
    data = await rig.shelf.put(5)
    for raw in busy:
        await raw.have()
        assert await raw.body() == data


async def test_a_connection_that_rests_makes_room_for_one_that_works(rig: Rig) -> None:
    server, client, data = await rig.serve(connections_max=2), rig.client(), await rig.shelf.put(0)
    resting = [await (await rig.raw(server)).introduce() for _ in range(2)]
    assert await get(client, at(server.address)) == data
    assert await resting[0].ended()


# Beginning and end.


async def test_on_a_stop_what_was_wanted_is_given_and_nothing_else(rig: Rig) -> None:
    server, client = await rig.serve(), rig.client()
    part = server.part()
    reading = asyncio.create_task(get(client, at(server.address), 1))
    await eventually(lambda: rig.shelf.waiting == 1)
    kept = await (await rig.raw(server)).introduce()
    assert part.stop_intake is not None
    assert part.drain is not None
    part.stop_intake()
    drained = asyncio.ensure_future(part.drain())
    await rig.shelf.put(0)
    with pytest.raises(NotHeld):
        await get(client, at(server.address), 0)
    await kept.want(0)
    assert getattr(await kept.hear(), "code", "") == "stopping"
    assert not drained.done()
    data = await rig.shelf.put(1)
    assert await reading == data
    await asyncio.wait_for(drained, 10)


async def test_the_address_is_told_once_it_listens_and_may_be_another_host(rig: Rig) -> None:
    server = await rig.serve(host="0.0.0.0", advertise="node-a.example")
    host, _, port = server.address.rpartition(":")
    assert host == "node-a.example"
    with pytest.raises(PortTaken):
        await rig.serve(port=int(port))


@pytest.mark.parametrize("settings", [{"token": ""}, {"host": "0.0.0.0"}, {"host": "::"}, {"host": "192.0.2.1"}])
async def test_what_cannot_work_is_refused_at_the_start(rig: Rig, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings):
        await rig.serve(**settings)

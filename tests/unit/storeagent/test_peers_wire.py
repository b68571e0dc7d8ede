from __future__ import annotations

from collections.abc import Callable

import pytest

from stoker_core.errors import InvalidMessage, NotHeld, PeerFailed, StokerError
from stoker_storeagent.peers.wire import (
    FRAME_BYTES_MAX,
    MESSAGE_CHARS_MAX,
    PROTOCOL,
    Auth,
    ClientSide,
    Denied,
    FrameReader,
    Have,
    Hello,
    Missing,
    Refused,
    ServerSide,
    Taken,
    Want,
    Welcome,
    frame,
)

TOKEN = "a token of the cluster"
WANT = Want(model_id="m-1", position=7, offset=4096, wait_ms=1500)


def server(*, node: str = "a", token: str = TOKEN, nonce: bytes = b"s" * 32) -> ServerSide:
    return ServerSide(node=node, token=token, nonce=nonce)


def client(*, node: str = "b", peer: str = "a", token: str = TOKEN, nonce: bytes = b"c" * 32) -> ClientSide:
    return ClientSide(node=node, peer=peer, token=token, nonce=nonce)


def hear(side: ServerSide | ClientSide, data: bytes) -> object:
    """What a side makes of bytes that it reads as it wants them. All of them are one message."""
    said = None
    while data:
        assert said is None, "it asks for no more than one message"
        piece, data = data[: side.needed], data[side.needed :]
        said = side.receive(piece)
    return said


def introduced() -> tuple[ServerSide, ClientSide]:
    ours, theirs = server(), client()
    auth = hear(theirs, ours.hello())
    assert isinstance(auth, bytes)
    assert isinstance(hear(ours, auth), Auth)
    assert isinstance(hear(theirs, ours.welcome()), Welcome)
    return ours, theirs


def test_who_both_know_the_token_get_to_know_each_other() -> None:
    ours, _ = introduced()
    assert ours.client == "b"


def test_a_chunk_is_wanted_given_and_taken_one_after_the_other() -> None:
    ours, theirs = introduced()
    for _ in range(2):
        assert hear(ours, theirs.want(WANT)) == WANT
        assert hear(theirs, ours.have(100, "xxh3_128:00")) == Have(size_bytes=100, digest="xxh3_128:00")
        assert hear(ours, theirs.taken()) == Taken()


def test_the_next_want_says_that_the_chunk_before_it_has_come() -> None:
    ours, theirs = introduced()
    hear(ours, theirs.want(WANT))
    hear(theirs, ours.have(1, ""))
    assert hear(ours, theirs.want(WANT)) == WANT


def test_after_a_missing_chunk_the_connection_serves_on() -> None:
    ours, theirs = introduced()
    hear(ours, theirs.want(WANT))
    assert hear(theirs, ours.missing(NotHeld("no such chunk"))) == Missing(code="not_held", message="no such chunk")
    assert hear(ours, theirs.want(WANT)) == WANT


def test_a_frame_may_come_in_any_pieces() -> None:
    reader, data = FrameReader(), frame(WANT)
    for at in range(len(data)):
        message = reader.feed(data[at : at + 1])
        assert (message is not None) == (at == len(data) - 1)
    assert message == data[4:]


def test_no_byte_is_asked_for_that_belongs_to_the_next_frame() -> None:
    reader = FrameReader()
    assert reader.needed == 4
    reader.feed((10).to_bytes(4, "big"))
    assert reader.needed == 10
    reader.feed(b"1234")
    assert reader.needed == 6
    assert reader.feed(b"567890") == b"1234567890"
    assert reader.needed == 4


@pytest.mark.parametrize("size", [0, FRAME_BYTES_MAX + 1, 0xFFFFFFFF])
def test_a_frame_that_is_too_long_is_refused_by_its_length_alone(size: int) -> None:
    with pytest.raises(InvalidMessage, match="may have"):
        FrameReader().feed(size.to_bytes(4, "big"))


# Who does not know the token.


def test_a_client_with_another_token_is_denied() -> None:
    ours, theirs = server(), client(token="another")
    auth = hear(theirs, ours.hello())
    assert isinstance(auth, bytes)
    assert isinstance(hear(ours, auth), Denied)
    assert ours.client == ""


def test_a_client_learns_of_a_server_that_does_not_know_the_token() -> None:
    theirs, impostor = client(), server(token="another")
    hear(theirs, impostor.hello())
    forged = frame(Welcome(proof=b"0" * 32))
    with pytest.raises(PeerFailed, match="token"):
        hear(theirs, forged)


def test_the_token_is_in_nothing_that_is_sent() -> None:
    ours, theirs = server(), client()
    hello = ours.hello()
    auth = hear(theirs, hello)
    assert isinstance(auth, bytes)
    hear(ours, auth)
    assert all(TOKEN.encode() not in sent for sent in (hello, auth, ours.welcome()))


def test_a_proof_is_no_good_on_another_connection() -> None:
    first, theirs = server(nonce=b"1" * 32), client()
    auth = hear(theirs, first.hello())
    assert isinstance(auth, bytes)
    assert isinstance(hear(first, auth), Auth)
    second = server(nonce=b"2" * 32)
    assert isinstance(hear(second, auth), Denied)


def test_a_proof_is_no_good_for_another_node_than_it_was_made_for() -> None:
    nonce = b"1" * 32
    auth = hear(client(peer="a"), server(node="a", nonce=nonce).hello())
    assert isinstance(auth, bytes)
    assert isinstance(hear(server(node="z", nonce=nonce), auth), Denied)


def test_nobody_can_use_a_proof_under_another_name() -> None:
    ours = server()
    sent = hear(client(), ours.hello())
    assert isinstance(sent, bytes)
    auth = hear(ours, sent)
    assert isinstance(auth, Auth)
    renamed = Auth(node="z", nonce=auth.nonce, proof=auth.proof)
    assert isinstance(hear(server(), frame(renamed)), Denied)


def test_a_clients_proof_sent_back_to_it_is_no_servers_proof() -> None:
    theirs = client(nonce=b"n" * 32)
    hello = frame(Hello(protocol=PROTOCOL, node="a", nonce=b"n" * 32))
    sent = hear(theirs, hello)
    assert isinstance(sent, bytes)
    auth = hear(server(nonce=b"n" * 32), sent)
    assert isinstance(auth, Auth)
    with pytest.raises(PeerFailed, match="token"):
        hear(theirs, frame(Welcome(proof=auth.proof)))


def test_a_client_wants_the_node_that_it_meant() -> None:
    with pytest.raises(PeerFailed, match="z answers in its place"):
        hear(client(peer="a"), server(node="z").hello())


def test_another_version_of_the_protocol_is_named() -> None:
    hello = frame(Hello(protocol=PROTOCOL + 1, node="a", nonce=b"n" * 32))
    with pytest.raises(PeerFailed, match=f"protocol {PROTOCOL + 1}"):
        hear(client(), hello)


# Refusals, and what is out of turn.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not_held", NotHeld),
        ("overloaded", NotHeld),
        ("stopping", NotHeld),
        ("unauthenticated", PeerFailed),
        ("storage_failed", PeerFailed),
    ],
)
def test_only_a_peer_with_which_something_is_wrong_has_failed(code: str, kind: type[StokerError]) -> None:
    with pytest.raises(kind) as at_once:
        hear(client(), frame(Refused(code=code, message="why")))
    assert type(at_once.value) is kind
    theirs = client()
    hear(theirs, server().hello())
    with pytest.raises(kind, match="why"):
        hear(theirs, frame(Refused(code=code, message="why")))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        frame(WANT),
        frame(Taken()),
        (3).to_bytes(4, "big") + b"\xc1\xc1\xc1",
        frame(Hello(protocol=PROTOCOL, node="a", nonce=b"n" * 32)),
    ],
)
def test_before_it_is_proven_a_client_can_say_nothing_else(data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        hear(server(), data)


def test_nonces_have_their_length() -> None:
    with pytest.raises(InvalidMessage, match="nonce"):
        hear(server(), frame(Auth(node="b", nonce=b"short", proof=b"")))


@pytest.mark.parametrize(
    "said",
    [lambda: Taken(), lambda: Want(model_id="m", position=-1), lambda: Auth(node="b", nonce=b"c" * 32, proof=b"")],
)
def test_out_of_turn_or_range_a_proven_client_is_cut_too(said: Callable[[], Taken | Want | Auth]) -> None:
    ours, _ = introduced()
    with pytest.raises(InvalidMessage):
        hear(ours, frame(said()))


@pytest.mark.parametrize("said", [Welcome(proof=b""), Hello(protocol=PROTOCOL, node="a", nonce=b"n" * 32), Taken()])
def test_a_server_that_answers_something_else_has_failed(said: Welcome | Hello | Taken) -> None:
    _, theirs = introduced()
    theirs.want(WANT)
    with pytest.raises(PeerFailed):
        hear(theirs, frame(said))


def test_messages_of_any_length_and_of_no_valid_text_can_be_told() -> None:
    ours, theirs = introduced()
    hear(ours, theirs.want(WANT))
    missing = hear(theirs, ours.missing(NotHeld("\udcff" + "x" * FRAME_BYTES_MAX)))
    assert isinstance(missing, Missing)
    assert missing.message.startswith("\\udcffxxx")
    assert len(missing.message) < 2 * MESSAGE_CHARS_MAX

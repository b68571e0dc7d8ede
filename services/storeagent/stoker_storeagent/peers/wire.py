"""Between storage agents, over TCP: who may speak, and what is asked. Bytes in, bytes out; no sockets here.

    server: Hello
    client: Auth
    server: Welcome, or Refused and the end
    client: Want
    server: Have and then the bytes themselves, or Missing
    client: Taken, once it has the last byte; then another Want, or the end

A frame is its length, four bytes big-endian, and a msgpack message. Both sides prove that they know the cluster's token
without sending it: an HMAC over fresh nonces of both, so that no proof is good for another connection, over both names, so
that none is good for another node, and over the role, so that none can be sent back to whom it came from.
After that nothing is encrypted or signed: chunks are held against their digests by those who get them.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from stoker_contracts.codec import Contract, decode, encode
from stoker_core.errors import InvalidMessage, NotHeld, PeerFailed, StokerError

PROTOCOL = 1
FRAME_BYTES_MAX = 64 * 1024
LENGTH_BYTES = 4
NONCE_BYTES = 32
MESSAGE_CHARS_MAX = 1000

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class _Message(Contract, frozen=True):
    FORMAT: ClassVar[Literal["json", "msgpack"]] = "msgpack"
    LIMIT_BYTES: ClassVar[int] = FRAME_BYTES_MAX


class Hello(_Message, frozen=True, tag="hello"):
    """Server → client, first of all."""

    protocol: int
    node: str
    nonce: Nonce


class Auth(_Message, frozen=True, tag="auth"):
    """Client → server."""

    node: str
    nonce: Nonce
    proof: bytes


class Welcome(_Message, frozen=True, tag="welcome"):
    """Server → client."""

    proof: bytes


class Refused(_Message, frozen=True, tag="refused"):
    """Server → client, and the end of the connection. code: of a StokerError, or unauthenticated."""

    code: str
    message: str


class Want(_Message, frozen=True, tag="want"):
    """Client → server: a chunk from `offset` on. Retry-safe. One at a time."""

    model_id: str
    position: Count
    offset: Count = 0
    wait_ms: Count = 0  # for a chunk that is on its way


class Have(_Message, frozen=True, tag="have"):
    """Server → client: this many bytes follow. digest: of the whole chunk, empty if it is not known."""

    size_bytes: Count
    digest: str = ""


class Missing(_Message, frozen=True, tag="missing"):
    """Server → client: not to be had here. code: of a StokerError."""

    code: str
    message: str


class Taken(_Message, frozen=True, tag="taken"):
    """Client → server: the last byte has arrived, and the server may let go of the chunk. The next Want says so too."""


@dataclass(frozen=True)
class Denied:
    """A client that does not know the token, or got no further than that."""

    reason: str


Said = Auth | Denied | Want | Taken
"""What a server hears."""


class FrameReader:
    """Puts a frame together. It never takes a byte that comes after it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._size_bytes = 0  # of the message; 0: its length is not here yet

    @property
    def needed(self) -> int:
        """Bytes to read next, at most."""
        return (self._size_bytes or LENGTH_BYTES) - len(self._data)

    def feed(self, data: bytes) -> bytes | None:
        """The message once it is complete. Raises InvalidMessage for one that is too long, or empty."""
        assert len(data) <= self.needed, "more than was asked for"
        self._data += data
        if self.needed:
            return None
        complete = bytes(self._data)
        self._data.clear()
        if self._size_bytes:
            self._size_bytes = 0
            return complete
        size_bytes = int.from_bytes(complete, "big")
        if not 0 < size_bytes <= FRAME_BYTES_MAX:
            raise InvalidMessage(f"a frame of {size_bytes} bytes; it may have 1 to {FRAME_BYTES_MAX}")
        self._size_bytes = size_bytes
        return None


def frame(message: _Message) -> bytes:
    data = encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def _proof(token: str, role: str, hello: Hello, client: str, client_nonce: bytes) -> bytes:
    said = (PROTOCOL, role, hello.node, client, hello.nonce, client_nonce)  # msgpack keeps the fields apart
    return hmac.digest(token.encode(), msgspec.msgpack.encode(said), "sha256")


class ServerSide:
    """One connection as the server sees it. After `Auth` it owes `welcome` or `refuse`, after a Want `have` or `missing`."""

    def __init__(self, *, node: str, token: str, nonce: bytes) -> None:
        """nonce: NONCE_BYTES that were never used before."""
        self.client = ""  # its node, once it is proven
        self._token, self._hello = token, Hello(protocol=PROTOCOL, node=node, nonce=nonce)
        self._frames = FrameReader()
        self._auth: Auth | None = None
        self._owing = False  # an answer
        self._sent = False  # a chunk, of which the client has not said that it has it

    @property
    def needed(self) -> int:
        """Bytes to read next, at most."""
        return self._frames.needed

    def hello(self) -> bytes:
        return frame(self._hello)

    def receive(self, data: bytes) -> Said | None:
        """What the client says, if that completes a message. Raises InvalidMessage; then the connection is to be cut."""
        assert not self._owing, "an answer is owed first"
        message = self._frames.feed(data)
        if message is None:
            return None
        if self._auth is None:
            return self._authenticate(decode(Auth, message))
        said: Want | Taken = decode(Want | Taken, message)
        if isinstance(said, Taken) and not self._sent:
            raise InvalidMessage("nothing was given that could be taken")
        self._owing, self._sent = isinstance(said, Want), False
        return said

    def _authenticate(self, auth: Auth) -> Auth | Denied:
        self._auth, self._owing = auth, True
        expected = _proof(self._token, "client", self._hello, auth.node, auth.nonce)
        if not hmac.compare_digest(auth.proof, expected):
            return Denied("it does not know the cluster's token")
        self.client = auth.node
        return auth

    def welcome(self) -> bytes:
        assert self._auth is not None, "nobody is there yet"
        assert self.client, "nobody is proven yet"
        self._answered()
        return frame(Welcome(proof=_proof(self._token, "server", self._hello, self.client, self._auth.nonce)))

    def refuse(self, code: str, message: str) -> bytes:
        """The connection ends with it."""
        return frame(Refused(code=code, message=_text(message)))

    def have(self, size_bytes: int, digest: str) -> bytes:
        """So many bytes are to be sent right after it."""
        self._answered()
        self._sent = True
        return frame(Have(size_bytes=size_bytes, digest=digest))

    def missing(self, error: StokerError) -> bytes:
        self._answered()
        return frame(Missing(code=error.code, message=_text(error.message)))

    def _answered(self) -> None:
        assert self._owing, "nothing was asked"
        self._owing = False


def _text(message: str) -> str:
    """A message may quote file names, which need not be valid text."""
    return message[:MESSAGE_CHARS_MAX].encode("utf-8", "backslashreplace").decode()


class ClientSide:
    """One connection as the client sees it. Whatever the peer says out of turn raises PeerFailed."""

    def __init__(self, *, node: str, peer: str, token: str, nonce: bytes) -> None:
        """peer: the node that is meant; another one that answers is refused.  nonce: as for ServerSide."""
        self.peer = peer
        self._node, self._token, self._nonce = node, token, nonce
        self._frames = FrameReader()
        self._hello: Hello | None = None
        self._expects: Any = Hello | Refused

    @property
    def needed(self) -> int:
        """Bytes of the next message to read, at most."""
        return self._frames.needed

    def receive(self, data: bytes) -> bytes | Welcome | Have | Missing | None:
        """What the peer says, if that completes a message; bytes: to be sent to it.

        After a Have its bytes follow, which are not for this. Raises PeerFailed, NotHeld if the peer has no room or no time
        for us.
        """
        assert self._expects is not None, "nothing was asked"
        try:
            message = self._frames.feed(data)
            if message is None:
                return None
            said = decode(self._expects, message)
        except InvalidMessage as error:
            raise PeerFailed(self.peer, error.message) from error
        if isinstance(said, Hello):
            return self._authenticate(said)
        if isinstance(said, Refused):
            raise failure(self.peer, said)
        if isinstance(said, Welcome):
            self._check(said)
        self._expects = None
        answer: Welcome | Have | Missing = said
        return answer

    def _authenticate(self, hello: Hello) -> bytes:
        if hello.protocol != PROTOCOL:
            raise PeerFailed(self.peer, f"speaks protocol {hello.protocol}, not {PROTOCOL}")
        if hello.node != self.peer:
            raise PeerFailed(self.peer, f"{hello.node} answers in its place")
        self._hello, self._expects = hello, Welcome | Refused
        proof = _proof(self._token, "client", hello, self._node, self._nonce)
        return frame(Auth(node=self._node, nonce=self._nonce, proof=proof))

    def _check(self, welcome: Welcome) -> None:
        assert self._hello is not None
        expected = _proof(self._token, "server", self._hello, self._node, self._nonce)
        if not hmac.compare_digest(welcome.proof, expected):
            raise PeerFailed(self.peer, "it does not know the cluster's token")

    def want(self, want: Want) -> bytes:
        assert self._expects is None, "one at a time"
        self._expects = Have | Missing
        return frame(want)

    def taken(self) -> bytes:
        return frame(Taken())


_ELSEWHERE = frozenset({"not_held", "overloaded", "stopping"})


def failure(peer: str, said: Refused | Missing) -> StokerError:
    """NotHeld where nothing is wrong with the peer, else PeerFailed."""
    if said.code in _ELSEWHERE:
        return NotHeld(f"{peer}: {said.message}")
    return PeerFailed(peer, f"{said.code}: {said.message}")

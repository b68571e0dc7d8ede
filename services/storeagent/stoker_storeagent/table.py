"""The pool's table of contents: which models lie in which chunks, in a memfd that outlives this process.

    0                                  4096                       4096 + slot
    ├─ magic, format, bytes of a slot ─┼─ slot of even sequences ─┼─ slot of odd ones ─┤
    slot: sequence u64, bytes u64, xxh3-64 of both and of what follows u64; then the snapshot in msgpack

A snapshot overwrites the one before the last. One that was cut off, wherever, does not match its checksum, so the last one
holds. All of it is little-endian.
"""

from __future__ import annotations

import fcntl
import os
import struct

import msgspec
import xxhash

from stoker_contracts.codec import pack_tokens, unpack_tokens
from stoker_core.errors import InvalidMessage, StorageFailed

CONTENTS_FORMAT = 1
"""Files of a model lie in its chunks byte for byte, a chunk for each position."""
FORMAT = 1
"""Of the table itself."""
SLOT_BYTES = 4 * 2**20
_MAGIC = b"stoktabl"
_HEAD = struct.Struct("<8sQQ")
_HEAD_BYTES = 4096
_SLOT = struct.Struct("<QQQ")
_SUMMED = struct.Struct("<QQ")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAME = "the pool's table"


class ResidentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the pool. chunks: by position.  holders: ids of the instances that had leased it."""

    model_id: str
    chunks: tuple[int, ...]
    complete: bool
    holders: tuple[str, ...] = ()


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """pool_chunks: of the whole pool.  format: of what the chunks hold; another one than the reader's is of no use to him."""

    residents: tuple[ResidentRecord, ...]
    pool_chunks: int
    format: int = CONTENTS_FORMAT


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    model_id: str
    chunks: bytes  # uint32 each
    complete: bool
    holders: tuple[str, ...]


class _PackedSnapshot(msgspec.Struct, frozen=True, array_like=True):
    format: int
    pool_chunks: int
    residents: tuple[_Packed, ...]


_decoder = msgspec.msgpack.Decoder(_PackedSnapshot)


class PoolTable:
    """One process writes. It may be killed at any instruction: then the snapshot before is read."""

    def __init__(self, slot_bytes: int = SLOT_BYTES) -> None:
        """A new one, empty. slot_bytes: a snapshot's limit, its head of 24 bytes included. Raises StorageFailed."""
        self._slot_bytes, self._sequence = slot_bytes, 0
        try:
            self._fd = os.memfd_create("stoker-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _failed(error) from error
        try:
            os.fchmod(self._fd, 0o600)
            # All of its memory now: a snapshot that could not be written would leave one that is not true any more.
            os.posix_fallocate(self._fd, 0, _HEAD_BYTES + 2 * slot_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            _write_all(self._fd, _HEAD.pack(_MAGIC, FORMAT, slot_bytes), 0)
        except OSError as error:
            os.close(self._fd)
            raise _failed(error) from error

    @classmethod
    def adopt(cls, fd: int) -> PoolTable:
        """Go on with the table behind `fd`, which stays the caller's. Raises InvalidMessage if it is none, StorageFailed."""
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            magic, written, slot_bytes = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
            size_bytes = os.fstat(fd).st_size
        except (OSError, struct.error) as error:
            raise InvalidMessage(f"the descriptor is no table: {error}") from error
        if sealed & _SEALS != _SEALS or magic != _MAGIC or size_bytes != _HEAD_BYTES + 2 * slot_bytes:
            raise InvalidMessage("the descriptor is no table")
        if written != FORMAT:
            raise InvalidMessage(f"the table has format {written}, not {FORMAT}")
        table = cls.__new__(cls)
        table._slot_bytes = slot_bytes
        try:
            table._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            raise _failed(error) from error
        table._sequence, _ = table._newest()
        return table

    def fileno(self) -> int:
        return self._fd

    def write(self, snapshot: Snapshot) -> None:
        """It is what `read` gives from now on. Raises StorageFailed if it is too large or there is no memory for it."""
        data = _encode(snapshot)
        if _SLOT.size + len(data) > self._slot_bytes:
            raise StorageFailed(_NAME, f"{len(data)} bytes are more than its {self._slot_bytes}")
        sequence = self._sequence + 1
        head = _SLOT.pack(sequence, len(data), _checksum(sequence, data))
        try:
            _write_all(self._fd, head + data, self._slot(sequence))
        except OSError as error:
            raise _failed(error) from error
        self._sequence = sequence  # only now: after a failure the same slot is the one to write to

    def read(self) -> Snapshot | None:
        """The newest that was written as a whole; None before the first. Raises StorageFailed, InvalidMessage."""
        _, data = self._newest()
        return None if data is None else _decode(data)

    def close(self) -> None:
        """Idempotent. The memory goes with its last descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _slot(self, sequence: int) -> int:
        return _HEAD_BYTES + sequence % 2 * self._slot_bytes

    def _newest(self) -> tuple[int, bytes | None]:
        found: tuple[int, bytes | None] = (0, None)
        for parity in (0, 1):
            try:
                sequence, size_bytes, checksum = _SLOT.unpack(os.pread(self._fd, _SLOT.size, self._slot(parity)))
                if sequence <= found[0] or sequence % 2 != parity or size_bytes > self._slot_bytes - _SLOT.size:
                    continue
                data = os.pread(self._fd, size_bytes, self._slot(parity) + _SLOT.size)
            except OSError as error:
                raise _failed(error) from error
            if _checksum(sequence, data) == checksum:
                found = sequence, data
        return found


def _encode(snapshot: Snapshot) -> bytes:
    residents = tuple(_Packed(r.model_id, pack_tokens(r.chunks), r.complete, r.holders) for r in snapshot.residents)
    return msgspec.msgpack.encode(_PackedSnapshot(snapshot.format, snapshot.pool_chunks, residents))


def _decode(data: bytes) -> Snapshot:
    """Raises InvalidMessage: the checksum was right, so another version wrote it."""
    try:
        packed = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidMessage(f"{_NAME}: {error}") from error
    residents = tuple(
        ResidentRecord(
            model_id=r.model_id, chunks=tuple(unpack_tokens(r.chunks)), complete=r.complete, holders=r.holders
        )
        for r in packed.residents
    )
    return Snapshot(residents=residents, pool_chunks=packed.pool_chunks, format=packed.format)


def _checksum(sequence: int, data: bytes) -> int:
    hashed = xxhash.xxh3_64(_SUMMED.pack(sequence, len(data)))
    hashed.update(data)
    return hashed.intdigest()


def _write_all(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def _failed(error: OSError) -> StorageFailed:
    return StorageFailed(_NAME, error.strerror or str(error))

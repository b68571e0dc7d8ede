"""The header of one safetensors file: parsed and checked without reading a byte of tensor data.

Source: the safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian
header length N, N bytes of JSON, then the data; `data_offsets` count from the start of the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from stoker_core.errors import CorruptCheckpoint

PREFIX_BYTES = 8
HEADER_BYTES_MAX = 100_000_000
"""The format's own limit."""
_EXTENT_BYTES_MAX = 2**63 - 1
_SHOWN_CHARS = 120
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "U16": 16,
        "I16": 16,
        "F16": 16,
        "BF16": 16,
        "U32": 32,
        "I32": 32,
        "F32": 32,
        "U64": 64,
        "I64": 64,
        "F64": 64,
        "C64": 64,
    }
)
"""Every dtype of the format and its bits per element; below 8, a tensor must still fill whole bytes."""


class TensorRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where one tensor lies. offset_bytes: from the start of the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset_bytes: int
    size_bytes: int


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file. data_offset_bytes: where its data begins; tensors: by offset, without gaps.

    mtime_ns: of the file that was parsed, -1 if not known.  digests: of each chunk of the file, empty if not known.
    """

    name: str
    size_bytes: int
    data_offset_bytes: int
    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]
    mtime_ns: int = -1
    digests: tuple[str, ...] = ()


def header_length(path: str, prefix: bytes, file_bytes: int) -> int:
    """The length of the JSON that follows the first eight bytes.

    prefix: the file's first 8 bytes, or all of a shorter file.  Raises CorruptCheckpoint out of bounds.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CorruptCheckpoint(path, f"{file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise CorruptCheckpoint(path, f"header length {length} at byte 0 is over the limit of {HEADER_BYTES_MAX}")
    if PREFIX_BYTES + length > file_bytes:
        raise CorruptCheckpoint(path, f"header length {length} at byte 0 exceeds the file's {file_bytes} bytes")
    return length


def bare_header(shard: Shard) -> bytes:
    """The beginning of a safetensors file that says of tensors what the shard's own says, and nothing of its data.

    Programs that look tensors up find them; one that reads data is told that the file is too short.
    """
    fields: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    for tensor in shard.tensors:
        begin = tensor.offset_bytes - shard.data_offset_bytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, begin + tensor.size_bytes),
        }
    text = json.dumps(fields).encode()
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def parse_header(path: str, name: str, header: bytes, file_bytes: int, *, mtime_ns: int = -1) -> Shard:
    """Check a whole header against the size of its file.

    path: for messages.  name: the shard's, in the tensors' references.  header: the JSON, as `header_length` says.
    Every byte of data must belong to exactly one tensor. Raises CorruptCheckpoint, whatever the bytes are.
    """
    data_offset = PREFIX_BYTES + len(header)
    data_bytes = file_bytes - data_offset
    if not header.startswith(b"{"):
        raise CorruptCheckpoint(path, f"the header at byte {PREFIX_BYTES} does not begin with '{{'")
    try:
        text = header.decode("utf-8")
        fields = json.loads(
            text,
            object_pairs_hook=_no_repeats,
            parse_int=_natural if "-" in text else int,  # for -0; it doubles the time
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError as error:
        raise CorruptCheckpoint(path, f"the header at byte {PREFIX_BYTES} is nested too deep") from error
    except ValueError as error:  # JSON, UTF-8, and the hooks below
        raise CorruptCheckpoint(path, f"the header at byte {PREFIX_BYTES} is no valid JSON: {shown(error)}") from error

    metadata = _metadata(path, fields.pop("__metadata__", {}))
    tensors = [_tensor(path, name, key, value, data_offset, data_bytes) for key, value in fields.items()]
    tensors.sort(key=lambda t: (t.offset_bytes, t.size_bytes))
    end = data_offset
    for tensor in tensors:
        if tensor.offset_bytes != end:
            what = (
                "overlaps the one before, which ends" if tensor.offset_bytes < end else "leaves a hole after what ends"
            )
            raise CorruptCheckpoint(
                path, f"tensor {shown(tensor.name)} at byte {tensor.offset_bytes} {what} at byte {end}"
            )
        end += tensor.size_bytes
    if end != file_bytes:
        raise CorruptCheckpoint(path, f"{file_bytes - end} bytes at byte {end} belong to no tensor")
    return Shard(
        name=name,
        size_bytes=file_bytes,
        data_offset_bytes=data_offset,
        tensors=tuple(tensors),
        metadata=metadata,
        mtime_ns=mtime_ns,
    )


def shown(value: object) -> str:
    """`value` for a message: cut, and safe to print whatever a file holds."""
    text = str(value)
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS] + "…"
    return repr(text) if isinstance(value, str) else text.encode("utf-8", "backslashreplace").decode()


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(repeated)} occurs twice")
    return fields


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"{digits[:24]} is no 64-bit natural number")
    return int(digits)


def _no_number(text: str) -> int:
    raise ValueError(f"{shown(text)} is no integer")


def _metadata(path: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CorruptCheckpoint(path, "__metadata__ is no map of strings")
    try:
        "".join((*value, *value.values())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorruptCheckpoint(path, "__metadata__ is no valid UTF-8") from error
    return value


def _tensor(path: str, shard: str, name: str, value: Any, data_offset: int, data_bytes: int) -> TensorRef:
    def corrupt(reason: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(path, f"tensor {shown(name)}: {reason}")

    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise corrupt("its name is no valid UTF-8") from error
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise corrupt("its entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt(f"unknown dtype {shown(dtype)}")
    if not _is_naturals(shape):
        raise corrupt("its shape is no list of natural numbers")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise corrupt("its data_offsets are no pair of natural numbers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise corrupt(f"bytes {begin} to {end} of the data are outside its {data_bytes} bytes")
    size_bits = DTYPE_BITS[dtype]
    for length in shape:
        size_bits *= length
        if size_bits > 8 * _EXTENT_BYTES_MAX:
            raise corrupt("its shape overflows 63 bits")
    if size_bits % 8 or size_bits // 8 != end - begin:
        raise corrupt(
            f"{dtype} × {shown(shape)} is {size_bits / 8:.15g} bytes, but bytes {begin} to {end} of the data are {end - begin}"
        )
    return TensorRef(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=shard,
        offset_bytes=data_offset + begin,
        size_bytes=end - begin,
    )


def _is_naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 (a generator would take twice as long)
        if type(item) is not int or not 0 <= item < 2**64:  # bool is an int to Python
            return False
    return True

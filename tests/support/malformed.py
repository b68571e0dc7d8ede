"""Safetensors files that break their format, each in one way."""

import json
import struct
from typing import Any

from stoker_checkpoint.header import HEADER_BYTES_MAX


def file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file. header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

MALFORMED = {
    "empty file": (b"", "too few"),
    "shorter than its prefix": (b"\0" * 7, "too few"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "exceeds the file's 10 bytes"),
    "header over the limit": (struct.pack("<Q", HEADER_BYTES_MAX + 1), "over the limit"),
    "header length of all ones": (b"\xff" * 8 + b"{}", "over the limit"),
    "no header at all": (struct.pack("<Q", 0), "does not begin with"),
    "space before the header": (file(b" {}"), "does not begin with"),
    "a list": (file(b"[]"), "does not begin with"),
    "cut JSON": (file(b'{"a":'), "no valid JSON"),
    "two values": (file(b"{}{}"), "no valid JSON"),
    "no UTF-8": (file(b'{"\xff":1}'), "no valid JSON"),
    "nested too deep": (file(NESTED), "nested too deep"),
    "a name twice": (file(b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}'), "'a' occurs twice"),
    "a field twice": (file(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' occurs twice"),
    "NaN": (file(b'{"a":NaN}'), "no integer"),
    "negative": (file({"a": entry(shape=[-2])}, b"\0" * 8), "natural"),
    "minus zero": (file(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "natural"),
    "a digit too many": (file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 30 + b',0],"data_offsets":[0,0]}}'), "natural"),
    "thousands of digits": (file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "digits"),
    "a fraction": (file({"a": entry(shape=[2.0])}, b"\0" * 8), "no integer"),
    "half a surrogate": (file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8), "UTF-8"),
    "metadata that is no map": (file({"__metadata__": "x"}), "no map of strings"),
    "metadata of numbers": (file({"__metadata__": {"n": 1}}), "no map of strings"),
    "an entry that is no map": (file({"a": 1}), "exactly dtype"),
    "no offsets": (file({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype"),
    "a field too many": (file({"a": entry(extra=1)}, b"\0" * 8), "exactly dtype"),
    "unknown dtype": (file({"a": entry(dtype="F31")}, b"\0" * 8), "unknown dtype 'F31'"),
    "dtype of another type": (file({"a": entry(dtype=[])}, b"\0" * 8), "unknown dtype"),
    "shape of booleans": (file({"a": entry(shape=[True, True])}, b"\0" * 8), "natural"),
    "shape that is no list": (file({"a": entry(shape=2)}, b"\0" * 8), "natural"),
    "one offset": (file({"a": entry(offsets=[0])}, b"\0" * 8), "no pair"),
    "offsets the wrong way": (file({"a": entry(offsets=[8, 0])}, b"\0" * 8), "outside"),
    "offsets past the end": (file({"a": entry(shape=[4], offsets=[0, 16])}, b"\0" * 8), "outside its 8 bytes"),
    "shape larger than its bytes": (file({"a": entry(shape=[3])}, b"\0" * 8), "is 12 bytes"),
    "shape smaller than its bytes": (file({"a": entry(shape=[1])}, b"\0" * 8), "is 4 bytes"),
    "shape that overflows": (file({"a": entry(shape=[2**63, 2**63])}, b"\0" * 8), "overflows"),
    "shape that overflows before its zero": (file({"a": entry(shape=[2**63, 2**63, 0], offsets=[0, 0])}), "overflows"),
    "half a byte": (file({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"\0"), "1.5 bytes"),
    "overlap": (file({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "the same place twice": (file({"a": entry(), "b": entry()}, b"\0" * 8), "overlaps"),
    "hole": (file({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "hole"),
    "hole at the start": (file({"a": entry(offsets=[4, 12])}, b"\0" * 12), "hole"),
    "data that nobody owns": (file({"a": entry()}, b"\0" * 9), "1 bytes at byte"),
}
"""Name → file, and what the error says of it."""

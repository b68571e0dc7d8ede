import json
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.malformed import MALFORMED, entry, file

from stoker_checkpoint.header import DTYPE_BITS, Shard, header_length, parse_header
from stoker_core.errors import CorruptCheckpoint


def parse(data: bytes) -> Shard:
    length = header_length("m.safetensors", data[:8], len(data))
    return parse_header("m.safetensors", "m.safetensors", data[8 : 8 + length], len(data))


def reference(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return tensors


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_corrupt_with_the_reason(name: str) -> None:
    data, reason = MALFORMED[name]
    with pytest.raises(CorruptCheckpoint, match=reason) as caught:
        parse(data)
    assert caught.value.path == "m.safetensors"
    assert len(caught.value.message) < 1000


def test_offsets_count_from_the_start_of_the_file() -> None:
    data = file({"__metadata__": {"format": "pt"}, "b": entry(offsets=[8, 16]), "a": entry()}, b"\0" * 16)
    shard = parse(data)
    begin = len(data) - 16
    assert shard.data_offset_bytes == begin
    assert [(t.name, t.offset_bytes, t.size_bytes, t.shape) for t in shard.tensors] == [
        ("a", begin, 8, (2,)),
        ("b", begin + 8, 8, (2,)),
    ]
    assert shard.metadata == {"format": "pt"}


@pytest.mark.parametrize("metadata", [b'{"a":"\\ud800"}', b'{"\\udfff":"a"}'])
def test_metadata_that_is_no_text_is_corrupt(metadata: bytes) -> None:
    data = file(b'{"__metadata__":' + metadata + b"}", b"")
    with pytest.raises(CorruptCheckpoint, match="UTF-8"):
        parse(data)
    with pytest.raises(safetensors.SafetensorError):  # type: ignore[attr-defined]
        reference(data)


def test_scalars_empty_tensors_and_padding_are_fine() -> None:
    header = json.dumps({"s": entry(shape=[], offsets=[0, 4]), "z": entry(shape=[0, 5], offsets=[4, 4])}).encode()
    assert {t.name for t in parse(file(header + b"   ", b"\0" * 4)).tensors} == {"s", "z"}


def test_every_dtype_of_the_reference_is_known() -> None:
    for dtype, bits in DTYPE_BITS.items():
        data = file({"a": entry(dtype=dtype, shape=[8], offsets=[0, bits])}, b"\0" * bits)
        reference(data)
        assert parse(data).tensors[0].size_bytes == bits


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    names = draw(st.lists(st.text(max_size=8), unique=True, max_size=6))
    header: dict[str, Any] = {
        "__metadata__": draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    }
    end = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), 8]
        size = DTYPE_BITS[dtype]
        for length in shape[:-1]:
            size *= length
        if name != "__metadata__":
            header[name] = entry(dtype, shape, [end, end + size])
            end += size
    order = draw(st.permutations(list(header)))
    text = json.dumps({key: header[key] for key in order}, ensure_ascii=draw(st.booleans())).encode()
    return file(text + b" " * draw(st.integers(0, 8)), b"\0" * end)


@given(valid_files())
@settings(max_examples=100, deadline=None)
def test_valid_files_parse_as_the_reference_parses_them(data: bytes) -> None:
    shard = parse(data)
    theirs = dict(reference(data))
    assert {t.name: (t.dtype, list(t.shape)) for t in shard.tensors} == {
        name: (value["dtype"], value["shape"]) for name, value in theirs.items()
    }
    assert shard.data_offset_bytes + sum(t.size_bytes for t in shard.tensors) == len(data)


@given(valid_files(), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_files_are_corrupt_or_accepted_by_the_reference_too(data: bytes, draw: st.DataObject) -> None:
    mutated = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, max(len(mutated) - 1, 0)))
        kind = draw.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        byte = draw.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789-",[]{}:.e'))))
        if kind == "set" and mutated:
            mutated[at] = byte
        elif kind == "insert":
            mutated.insert(at, byte)
        elif kind == "delete":
            del mutated[at : at + 1]
        else:
            del mutated[at:]
    try:
        shard = parse(bytes(mutated))
    except CorruptCheckpoint:
        return
    theirs = reference(bytes(mutated))
    assert {t.name for t in shard.tensors} == {name for name, _ in theirs}


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_is_corrupt(header: bytes) -> None:
    try:
        shard = parse(file(header))
    except CorruptCheckpoint:
        return
    assert shard.tensors == ()

"""A manifest as bytes: the same again, and whatever is not one is corrupt."""

import time
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_checkpoint import leased
from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.header import DTYPE_BITS, Shard, TensorRef
from stoker_checkpoint.leased import MANIFEST, decode_manifest, encode_manifest, read_manifest
from stoker_checkpoint.manifest import Manifest, build_manifest
from stoker_checkpoint.plan import chunk_count
from stoker_core.errors import CorruptCheckpoint, ReadFailed, RefusedCheckpoint

HEAD = b"StkMani1"
WORDS = st.text(max_size=12)


@st.composite
def shards(draw: st.DrawFn, number: int) -> Shard:
    name = f"{number}-{draw(st.sampled_from(['model', 'ü', 'a b']))}.safetensors"
    begin = end = draw(st.integers(8, 10**6))
    refs = []
    for index in range(draw(st.integers(0 if number else 1, 5))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = (*draw(st.lists(st.integers(0, 2**20), max_size=2)), 8)
        size = DTYPE_BITS[dtype]
        for length in shape[:-1]:
            size *= length
        refs.append(
            TensorRef(
                name=f"{number}.{index}.{draw(WORDS)}",
                dtype=dtype,
                shape=shape,
                shard=name,
                offset_bytes=end,
                size_bytes=size,
            )
        )
        end += size
    count = chunk_count(end)
    known = count < 50 and draw(st.booleans())
    return Shard(
        name=name,
        size_bytes=end,
        data_offset_bytes=begin,
        tensors=tuple(refs),
        metadata=draw(st.dictionaries(WORDS, WORDS, max_size=2)),
        mtime_ns=draw(st.integers(-1, 2**62)),
        digests=tuple(chunk_digest(bytes([place])) for place in range(count)) if known else (),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    return build_manifest("d", [draw(shards(number)) for number in range(draw(st.integers(1, 4)))])


@given(manifests())
@settings(max_examples=100, deadline=None)
def test_every_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded, "m") == manifest
    assert decode_manifest(memoryview(encoded), Path("m")) == manifest


def of_one(**changes: object) -> Manifest:
    tensor = TensorRef(name="w", dtype="F32", shape=(2, 3), shard="a", offset_bytes=100, size_bytes=24)
    shard = Shard(name="a", size_bytes=124, data_offset_bytes=100, tensors=(tensor,), metadata={"format": "pt"})
    return Manifest(shards=(msgspec.structs.replace(shard, **changes),))


def sealed(content: bytes) -> bytes:
    return HEAD + xxhash.xxh3_128_digest(content) + content


def test_the_bytes_are_what_the_format_says() -> None:
    content = msgspec.msgpack.encode([["a", 124, 100, -1, [], {"format": "pt"}, [["w", "F32", [2, 3], 24]]]])
    assert encode_manifest(of_one()) == sealed(content)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_that_were_damaged_are_corrupt(data: st.DataObject) -> None:
    encoded = bytearray(encode_manifest(of_one()))
    if data.draw(st.booleans()):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del encoded[data.draw(st.integers(0, len(encoded) - 1)) :]
    with pytest.raises(CorruptCheckpoint):
        decode_manifest(bytes(encoded), "m")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_bytes_of_anything_else_are_corrupt(content: bytes) -> None:
    for data in (content, HEAD + content, sealed(content)):
        with pytest.raises(CorruptCheckpoint) as caught:
            decode_manifest(data, "here")
        assert caught.value.path == "here"


SHARD = ["a", 124, 100, -1, [], {}, [["w", "F32", [2, 3], 24]]]


def with_item(place: int, value: object) -> list[object]:
    return [*SHARD[:place], value, *SHARD[place + 1 :]]


@pytest.mark.parametrize(
    "packed",
    [
        [],
        [with_item(6, [])],
        [with_item(0, "../a")],
        [with_item(1, 125)],
        [with_item(1, -1)],
        [with_item(2, 99)],
        [with_item(2, 2**63)],
        [with_item(3, 0.5)],
        [with_item(4, ["xxh3_128:" + "0" * 31])],
        [with_item(4, ["xxh3_128:" + "0" * 32 + "\n"])],
        [with_item(4, ["xxh3_128:../" + "0" * 29])],
        [with_item(4, ["xxh3_128:" + "0" * 32] * 2)],
        [with_item(5, {"a": 1})],
        [with_item(6, [["w", "F32", [2, 2], 24]])],
        [with_item(6, [["w", "F33", [2, 3], 24]])],
        [with_item(6, [["w", "F33", [2, 0], 0], ["v", "F32", [2, 3], 24]])],
        [with_item(6, [["w", "F32", [-2, -3], 24]])],
        [with_item(6, [["w", "F32", [2, 3], 24], ["w", "F32", [0], 0]])],
        [SHARD, SHARD],
        [SHARD, with_item(6, [["v", "F32", [2, 3], 24]])],
    ],
)
def test_what_no_checkpoint_can_be_is_corrupt(packed: list[object]) -> None:
    with pytest.raises(CorruptCheckpoint):
        decode_manifest(sealed(msgspec.msgpack.encode(packed)), "m")


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode_manifest(of_one())
    monkeypatch.setattr(leased, "MANIFEST_BYTES_MAX", len(encoded) - 1)
    with pytest.raises(RefusedCheckpoint, match="the limit"):
        encode_manifest(of_one())
    with pytest.raises(CorruptCheckpoint, match="more than"):
        decode_manifest(encoded, "m")


def test_a_folder_without_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReadFailed) as caught:
        read_manifest(tmp_path)
    assert caught.value.path == str(tmp_path / MANIFEST)
    (tmp_path / MANIFEST).write_bytes(b"")
    with pytest.raises(CorruptCheckpoint):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(encode_manifest(of_one()))
    assert read_manifest(tmp_path) == of_one()


def seconds_to_decode(tensors: int) -> float:
    refs = tuple(
        TensorRef(
            name=f"model.layers.{number}.self_attn.q_proj.weight",
            dtype="BF16",
            shape=(64, 128),
            shard="a",
            offset_bytes=100 + number * 16384,
            size_bytes=16384,
        )
        for number in range(tensors)
    )
    shard = Shard(name="a", size_bytes=100 + tensors * 16384, data_offset_bytes=100, tensors=refs, metadata={})
    encoded = encode_manifest(Manifest(shards=(shard,)))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        decode_manifest(encoded, "m")
        took.append(time.perf_counter() - began)
    return min(took)


def test_decoding_takes_time_linear_in_the_number_of_tensors() -> None:
    small, large = seconds_to_decode(1_000), seconds_to_decode(10_000)
    assert large < 30 * small
    print(f"10,000 tensors: {large * 1e3:.1f} ms")

import json

import pytest

from stoker_checkpoint.header import Shard, TensorRef
from stoker_checkpoint.manifest import build_manifest, is_plain_name, parse_index
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint


def shard(name: str, **tensors: tuple[str, int]) -> Shard:
    refs, end = [], 100
    for tensor, (dtype, size) in tensors.items():
        refs.append(TensorRef(name=tensor, dtype=dtype, shape=(size,), shard=name, offset_bytes=end, size_bytes=size))
        end += size
    return Shard(name=name, size_bytes=end, data_offset_bytes=100, tensors=tuple(refs), metadata={})


def index(**weight_map: object) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


def test_totals_count_data_by_dtype_the_largest_first() -> None:
    manifest = build_manifest("d", [shard("b", y=("BF16", 30)), shard("a", x=("F32", 20), w=("BF16", 4))])
    assert manifest.bytes_by_dtype == {"BF16": 34, "F32": 20}
    assert manifest.data_bytes == 54
    assert manifest.file_bytes == 254
    assert [s.name for s in manifest.shards] == ["a", "b"]
    assert [t.name for t in manifest.tensors] == ["x", "w", "y"]


def test_a_tensor_in_two_shards_is_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match="'x' is in both a and b"):
        build_manifest("d", [shard("a", x=("F32", 4)), shard("b", x=("F32", 4))])


def test_a_checkpoint_without_tensors_is_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match="no tensor"):
        build_manifest("d", [shard("a")])


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"x": "b"}, "names the shard 'b', which is missing"),
        ({"x": "a", "y": "a"}, "a holds tensor 'y', but it does not"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_corrupt(named: dict[str, str], reason: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=reason):
        build_manifest("d", [shard("a", x=("F32", 4))], named)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", "", ".hidden", "a\0b", "x" * 256, "\ud800"],
)
def test_an_index_may_name_only_files_beside_it(name: str) -> None:
    assert not is_plain_name(name)
    content = b'{"weight_map":{"x":"\\ud800"}}' if name == "\ud800" else index(x=name)
    with pytest.raises(RefusedCheckpoint, match="plain file name"):
        parse_index("i.json", content)


def test_an_index_may_name_safetensors_only() -> None:
    with pytest.raises(RefusedCheckpoint, match="no safetensors"):
        parse_index("i.json", index(x="pytorch_model.bin"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map":[]}', b'{"weight_map":{}}', index(x=1), b"[" * 100_000, b"\xff"]
)
def test_a_malformed_index_is_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        parse_index("i.json", content)

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint import directory, layout
from stoker_checkpoint.directory import inspect_directory, resolve_inside
from stoker_checkpoint.layout import INDEX
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def test_the_files_that_belong_are_found(model: Path) -> None:
    for stray in ("README.md", "training_args.bin", "consolidated.safetensors", "notes.txt"):
        (model / stray).write_bytes(b"not read")
    found = inspect_directory(model)
    assert [shard.name for shard in found.manifest.shards] == ["model.safetensors"]
    assert list(found.small_files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert found.total_bytes == sum((model / n).stat().st_size for n in [
        "model.safetensors", *found.small_files
    ])  # fmt: skip


def test_shards_are_the_ones_that_the_index_names(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", shards=3)
    (model / "model.safetensors").write_bytes(b"not in the index, so not read")
    found = inspect_directory(model)
    assert len(found.manifest.shards) == 3
    assert len(found.manifest.tensors) == 21
    assert INDEX in found.small_files


def test_one_checkpoint_is_the_same_in_one_file_and_in_shards(tmp_path: Path) -> None:
    one = inspect_directory(write_tiny_model(tmp_path / "one"))
    many = inspect_directory(write_tiny_model(tmp_path / "many", shards=4))
    assert one.manifest.data_bytes == many.manifest.data_bytes
    assert one.manifest.bytes_by_dtype == many.manifest.bytes_by_dtype == {"BF16": one.manifest.data_bytes}


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_weights_for_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def link_outside(model: Path) -> None:
    outside = model.parent / "blob"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)


def link_config_outside(model: Path) -> None:
    outside = model.parent / "config-elsewhere"
    (model / "config.json").rename(outside)
    (model / "config.json").symlink_to("../config-elsewhere")


def fifo(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")


def loop(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")


def index_outside(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def index_missing_shard(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "No such file"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer is missing"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no safetensors"),
    "pickle only": (drop_weights_for_pickle, "pytorch_model.bin: it is a pickle"),
    "no known weights": (
        lambda m: (m / "model.safetensors").rename(m / "a.safetensors"),
        "neither model.safetensors nor",
    ),
    "missing shard": (index_missing_shard, "1 of 1 shards are missing"),
    "index that leaves the root": (index_outside, "plain file name"),
    "link that leaves the root": (link_outside, "leaves the model's directory"),
    "configuration link that leaves the root": (link_config_outside, "leaves the model's directory"),
    "loop of links": (loop, "tokenizer.json"),
    "pipe": (fifo, "no regular file"),
    "auto_map": (lambda m: edit_json(m / "config.json", auto_map={"AutoModel": "m.M"}), "custom code"),
    "auto_map of the tokenizer": (lambda m: edit_json(m / "tokenizer_config.json", auto_map={}), "custom code"),
    "code": (lambda m: (m / "modeling_x.py").write_text(""), "custom code"),
    "configuration that is no JSON": (lambda m: (m / "config.json").write_text("{"), "no valid JSON"),
    "configuration that is no object": (lambda m: (m / "config.json").write_text("[]"), "no JSON object"),
    "configuration nested too deep": (lambda m: (m / "config.json").write_text("[" * 100_000), "no valid JSON"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_directory_that_cannot_be_served_is_refused_with_the_reason(model: Path, name: str) -> None:
    spoil, reason = REFUSALS[name]
    spoil(model)
    with pytest.raises(RefusedCheckpoint, match=reason) as caught:
        inspect_directory(model)
    assert caught.value.path.startswith(str(model))


def test_a_broken_shard_is_corrupt_and_named(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        inspect_directory(model)


def test_small_files_are_bounded_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (directory, layout):
        monkeypatch.setattr(module, "SMALL_FILES_BYTES_MAX", 1000)
    with pytest.raises(RefusedCheckpoint, match="exceed 1000 bytes"):
        inspect_directory(model)


def test_entries_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ENTRIES_MAX", 3)
    with pytest.raises(RefusedCheckpoint, match="more than 3 entries"):
        inspect_directory(model)


def test_links_inside_of_the_root_and_to_the_root_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "blobs").mkdir()
    (model / "model.safetensors").rename(model / "blobs" / "abc")
    (model / "model.safetensors").symlink_to("blobs/abc")
    (tmp_path / "current").symlink_to(model)
    assert inspect_directory(tmp_path / "current").root == model


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
def test_names_that_leave_the_root_are_not_resolved(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedCheckpoint, match="no plain file name"):
        resolve_inside(tmp_path, name)

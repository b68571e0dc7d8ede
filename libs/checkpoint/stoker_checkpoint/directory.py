"""A Hugging Face model directory: which of its files belong to the model, and whether they may be served.

Nothing in a directory is ever executed or unpickled; whatever would need it is refused.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stoker_checkpoint.header import PREFIX_BYTES, Shard, header_length, parse_header, shown
from stoker_checkpoint.manifest import Manifest, build_manifest, is_plain_name, parse_index
from stoker_core.errors import CorruptCheckpoint, RefusedCheckpoint

ENTRIES_MAX = 10_000
SMALL_FILES_BYTES_MAX = 64 * 1024 * 1024
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SMALL = frozenset(
    {
        INDEX,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "hf_quant_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "quantize_config.json",
        "special_tokens_map.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_SMALL_SUFFIXES = (".model", ".tiktoken")  # sentencepiece and tiktoken vocabularies
_TOKENIZERS = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"tekken.json"},
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SmallFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is kept whole: configuration or tokenizer."""

    name: str
    content: bytes


class CheckpointDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that may be served. root: without symlinks.  small_files: by name, the index of shards included.

    Whatever else lies in the directory does not belong to the model.
    """

    root: Path
    manifest: Manifest
    config: dict[str, Any]
    small_files: tuple[SmallFile, ...]

    @property
    def total_bytes(self) -> int:
        return self.manifest.file_bytes + sum(len(file.content) for file in self.small_files)


def inspect_directory(directory: Path) -> CheckpointDirectory:
    """Read headers and small files of a model directory. Blocks on the disk: call it in a thread.

    Raises RefusedCheckpoint for what cannot be served safely or at all, with the file and the reason, and its subclass
    CorruptCheckpoint for a safetensors file or index that breaks its format.
    """
    try:
        root = directory.resolve(strict=True)
        names = entries(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
        raise unreadable(directory, error) from error
    _refuse_code(root, names)
    _refuse_incomplete(root, names)
    small = read_small_files(root, sorted(name for name in names if name in _SMALL or name.endswith(_SMALL_SUFFIXES)))
    contents = {file.name: file.content for file in small}
    configs = {name: _json_object(root / name, text) for name, text in contents.items() if name.endswith("config.json")}
    for name, config in configs.items():
        if "auto_map" in config:
            raise RefusedCheckpoint(str(root / name), "auto_map asks for custom code; Stoker runs none")
    return CheckpointDirectory(
        root=root,
        manifest=read_manifest(root, names, contents),
        config=configs["config.json"],
        small_files=tuple(small),
    )


def resolve_inside(root: Path, name: str) -> Path:
    """The regular file that `name` means directly inside `root` (which has no symlinks), links followed.

    Raises RefusedCheckpoint if it is missing, leaves the root, or is no regular file.
    """
    path = root / name
    if not is_plain_name(name):
        raise RefusedCheckpoint(str(root), f"{shown(name)} is no plain file name")
    try:
        target = path.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    if not target.is_relative_to(root):
        raise RefusedCheckpoint(str(path), "it is a link that leaves the model's directory; copy the files (cp -rL)")
    if not regular:
        raise RefusedCheckpoint(str(path), "it is no regular file")
    return target


def entries(root: Path) -> set[str]:
    """Names of what lies in `root`. Raises OSError, RefusedCheckpoint for too many."""
    names: set[str] = set()
    with os.scandir(root) as found:
        for entry in found:
            names.add(entry.name)
            if len(names) > ENTRIES_MAX:
                raise RefusedCheckpoint(str(root), f"it has more than {ENTRIES_MAX} entries")
    return names


def _refuse_code(root: Path, names: set[str]) -> None:
    scripts = sorted(name for name in names if name.endswith(".py"))
    if scripts:
        raise RefusedCheckpoint(
            str(root / scripts[0]),
            "the directory holds custom code; Stoker runs none. Remove it if the model needs none",
        )


def _refuse_incomplete(root: Path, names: set[str]) -> None:
    if "config.json" not in names:
        raise RefusedCheckpoint(str(root), "config.json is missing")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise RefusedCheckpoint(
                str(root / pickles[0]),
                "it is a pickle, which can run code when loaded; convert the model to safetensors",
            )
        raise RefusedCheckpoint(str(root), "it holds no safetensors file")
    if not any(needed <= names for needed in _TOKENIZERS):
        raise RefusedCheckpoint(str(root), "its tokenizer is missing (tokenizer.json)")


def read_small_files(root: Path, names: Sequence[str]) -> list[SmallFile]:
    """Raises RefusedCheckpoint, also if they are too large together."""
    files = []
    left = SMALL_FILES_BYTES_MAX
    for name in names:
        target = resolve_inside(root, name)
        try:
            with target.open("rb") as file:
                content = file.read(left + 1)
        except OSError as error:
            raise unreadable(target, error) from error
        left -= len(content)
        if left < 0:
            raise RefusedCheckpoint(
                str(root / name), f"with it, configuration and tokenizer exceed {SMALL_FILES_BYTES_MAX} bytes"
            )
        files.append(SmallFile(name=name, content=content))
    return files


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedCheckpoint(str(path), f"it is no valid JSON: {shown(error)}") from error
    if not isinstance(value, dict):
        raise RefusedCheckpoint(str(path), "it is no JSON object")
    return value


def read_manifest(root: Path, names: set[str], contents: Mapping[str, bytes]) -> Manifest:
    """Parse the headers of the shards that belong to the model. Raises as `inspect_directory`.

    names: of the directory's entries.  contents: of its small files; only the index of shards is looked at.
    """
    if INDEX in contents:
        index = parse_index(str(root / INDEX), contents[INDEX])
        wanted = sorted(set(index.values()))
    elif SINGLE in names:
        index, wanted = {}, [SINGLE]
    else:
        raise RefusedCheckpoint(str(root), f"it has neither {SINGLE} nor {INDEX}")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise RefusedCheckpoint(
            str(root), f"{len(missing)} of {len(wanted)} shards are missing; the first is {shown(missing[0])}"
        )
    return build_manifest(str(root), [read_shard(root, name) for name in wanted], index)


def read_shard(root: Path, name: str) -> Shard:
    """Parse one safetensors file's header. Blocks on the disk.

    Raises RefusedCheckpoint as `resolve_inside` does, CorruptCheckpoint if it breaks the format.
    """
    target = resolve_inside(root, name)
    path = str(root / name)
    try:
        with target.open("rb") as file:
            found = os.fstat(file.fileno())
            file_bytes = found.st_size
            length = header_length(path, file.read(PREFIX_BYTES), file_bytes)
            header = file.read(length)
    except OSError as error:
        raise unreadable(target, error) from error
    if len(header) != length:
        raise CorruptCheckpoint(path, f"it ended at byte {PREFIX_BYTES + len(header)}, inside its header")
    return parse_header(path, name, header, file_bytes, mtime_ns=found.st_mtime_ns)


def unreadable(path: Path, error: Exception) -> RefusedCheckpoint:
    """`error` of the operating system, as the reason why `path` cannot be served."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error)
    return RefusedCheckpoint(str(path), reason)

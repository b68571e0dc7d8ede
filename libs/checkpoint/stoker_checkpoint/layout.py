"""A Hugging Face model directory, wherever it lies: which of its files belong to the model, and whether they may be served.

Nothing in it is ever executed or unpickled; whatever would need that is refused. Nothing here does I/O: `where` names the
directory in messages, be it a path or the URL of a prefix in a bucket.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from typing import Any

from stoker_checkpoint.header import shown
from stoker_checkpoint.manifest import parse_index
from stoker_core.errors import RefusedCheckpoint

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


def file_in(where: str, name: str) -> str:
    """A file of the directory, for messages."""
    return f"{where.rstrip('/')}/{name}"


def check_names(where: str, names: Set[str]) -> None:
    """Raises RefusedCheckpoint for custom code, and if the names alone show that something is missing."""
    _refuse_code(where, names)
    _refuse_incomplete(where, names)


def small_names(names: Iterable[str]) -> list[str]:
    """Those that are kept whole, configuration and tokenizer, the index of shards included; ordered."""
    return sorted(name for name in names if name in _SMALL or name.endswith(_SMALL_SUFFIXES))


def check_small_bytes(where: str, name: str, total_bytes: int) -> None:
    """total_bytes: of the small files up to `name`.  Raises RefusedCheckpoint if they are too large together."""
    if total_bytes > SMALL_FILES_BYTES_MAX:
        raise RefusedCheckpoint(
            file_in(where, name), f"with it, configuration and tokenizer exceed {SMALL_FILES_BYTES_MAX} bytes"
        )


def check_entries(where: str, count: int) -> None:
    """Raises RefusedCheckpoint for too many."""
    if count > ENTRIES_MAX:
        raise RefusedCheckpoint(where, f"it has more than {ENTRIES_MAX} entries")


def read_configs(where: str, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """What config.json says, once every configuration was looked at. contents: of the small files, config.json among them.

    Raises RefusedCheckpoint for what is no JSON, and for what asks for custom code.
    """
    configs = {
        name: _json_object(file_in(where, name), text)
        for name, text in contents.items()
        if name.endswith("config.json")
    }
    for name, config in configs.items():
        if "auto_map" in config:
            raise RefusedCheckpoint(file_in(where, name), "auto_map asks for custom code; Stoker runs none")
    return configs["config.json"]


def find_shards(where: str, names: Set[str], contents: Mapping[str, bytes]) -> tuple[list[str], dict[str, str]]:
    """The shards that belong to the model, ordered, and the index: tensor → shard, empty if there is none.

    names: of the directory's entries.  contents: of its small files; only the index of shards is looked at.
    Raises RefusedCheckpoint if shards are missing or lie elsewhere, CorruptCheckpoint for a malformed index.
    """
    if INDEX in contents:
        index = parse_index(file_in(where, INDEX), contents[INDEX])
        wanted = sorted(set(index.values()))
    elif SINGLE in names:
        index, wanted = {}, [SINGLE]
    else:
        raise RefusedCheckpoint(where, f"it has neither {SINGLE} nor {INDEX}")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise RefusedCheckpoint(
            where, f"{len(missing)} of {len(wanted)} shards are missing; the first is {shown(missing[0])}"
        )
    return wanted, index


def _refuse_code(where: str, names: Set[str]) -> None:
    scripts = sorted(name for name in names if name.endswith(".py"))
    if scripts:
        raise RefusedCheckpoint(
            file_in(where, scripts[0]),
            "the directory holds custom code; Stoker runs none. Remove it if the model needs none",
        )


def _refuse_incomplete(where: str, names: Set[str]) -> None:
    if "config.json" not in names:
        raise RefusedCheckpoint(where, "config.json is missing")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise RefusedCheckpoint(
                file_in(where, pickles[0]),
                "it is a pickle, which can run code when loaded; convert the model to safetensors",
            )
        raise RefusedCheckpoint(where, "it holds no safetensors file")
    if not any(needed <= names for needed in _TOKENIZERS):
        raise RefusedCheckpoint(where, "its tokenizer is missing (tokenizer.json)")


def _json_object(path: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedCheckpoint(path, f"it is no valid JSON: {shown(error)}") from error
    if not isinstance(value, dict):
        raise RefusedCheckpoint(path, "it is no JSON object")
    return value

"""From config.json and what `stoker deploy` asked for to a ModelSpec: the sizes that placement relies on."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from stoker_checkpoint.header import DTYPE_BITS, shown
from stoker_checkpoint.layout import file_in
from stoker_checkpoint.manifest import Manifest
from stoker_contracts.models import EngineKind, ModelOptions, ModelSpec
from stoker_core.errors import InvalidRequest, RefusedCheckpoint

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CAST = frozenset({"BF16", "F16", "F32", "F64"})  # what an engine casts to the dtype it runs in

DEFAULT_LEN_MAX = 8192
"""Tokens. Longer contexts must be asked for: each start pays for the KV cache."""
KV_BLOCK_TOKENS = 128
KV_SPARE_BLOCKS = 4
KV_TOKEN_BYTES_MAX = 2**30
KV_CACHE_BYTES_MAX = 2**50
REPLICAS_MAX = 1024
SLOTS_MAX = 1024
QUEUE_MAX = 100_000
SECONDS_MAX = 7 * 24 * 3600.0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What config.json says of a causal language model. dtype: the checkpoint's own."""

    architecture: str
    dtype: str
    max_position_embeddings: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers, kept in `dtype`."""
        return self.layers * self.kv_heads * self.head_dim * 2 * DTYPE_BYTES[dtype]


def read_config(where: str, config: dict[str, Any], manifest: Manifest) -> ModelConfig:
    """where: the directory that `config` comes from, for messages.

    Raises RefusedCheckpoint naming the field that is missing or cannot be served.
    """
    path = file_in(where, "config.json")
    if config.get("kv_lora_rank") is not None:
        raise RefusedCheckpoint(path, "kv_lora_rank: models with latent attention cannot be sized yet")
    heads = _positive(path, config, "num_attention_heads")
    hidden = _positive(path, config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise RefusedCheckpoint(path, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    read = ModelConfig(
        architecture=_architecture(path, config),
        dtype=_dtype(path, config, manifest),
        max_position_embeddings=_positive(path, config, "max_position_embeddings"),
        vocab_size=_positive(path, config, "vocab_size"),
        layers=_positive(path, config, "num_hidden_layers"),
        kv_heads=_positive(path, config, "num_key_value_heads", default=heads),
        head_dim=_positive(path, config, "head_dim", default=hidden // heads),
    )
    if (size_bytes := read.kv_bytes_per_token("float32")) > KV_TOKEN_BYTES_MAX:
        raise RefusedCheckpoint(
            path, f"num_hidden_layers × num_key_value_heads × head_dim: {size_bytes} bytes per token"
        )
    return read


def model_spec(
    name: str, model_id: str, source: str, config: dict[str, Any], manifest: Manifest, options: ModelOptions
) -> ModelSpec:
    """What the scheduler places: defaults from the checkpoint where `options` leave them open.

    source: the URL that the checkpoint comes from.  config: what its config.json says.
    Raises RefusedCheckpoint as `read_config` does, InvalidRequest naming the option that cannot be met.
    """
    _check(options)
    read = read_config(source, config, manifest)
    dtype = read.dtype if options.dtype == "auto" else options.dtype
    max_len = _max_model_len(read, options)
    per_token = read.kv_bytes_per_token(dtype)
    return ModelSpec(
        model_id=model_id,
        name=name,
        source=source,
        architecture=read.architecture,
        dtype=dtype,
        weight_bytes=_weight_bytes(manifest, dtype),
        max_model_len=max_len,
        vocab_size=read.vocab_size,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=_kv_cache_bytes(per_token, max_len, options),
        slots=options.slots,
        engine=options.engine,
        keep_alive_s=options.keep_alive_s,
        queue_max=options.queue_max,
        wait_s=options.wait_s,
        tensor_parallel=options.tensor_parallel,
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        target_concurrency=options.target_concurrency,
        keep_alive_auto=options.keep_alive_auto,
    )


def _max_model_len(config: ModelConfig, options: ModelOptions) -> int:
    own = config.max_position_embeddings
    if options.max_model_len is None:
        return min(own, DEFAULT_LEN_MAX)
    if not 1 <= options.max_model_len <= own:
        raise InvalidRequest(
            f"max_model_len {options.max_model_len} must be from 1 to the model's own {own}", "max_model_len"
        )
    return options.max_model_len


def _kv_cache_bytes(per_token: int, max_len: int, options: ModelOptions) -> int:
    # An engine zero-fills its KV cache at every start (2.5 s per GiB on CPUs), so the default is no larger than needed.
    blocks = math.ceil(max_len / KV_BLOCK_TOKENS)
    block_bytes = KV_BLOCK_TOKENS * per_token
    if options.kv_cache_bytes is None:
        return (blocks + KV_SPARE_BLOCKS) * block_bytes
    if options.kv_cache_bytes < blocks * block_bytes:
        raise InvalidRequest(
            f"kv_cache_bytes {options.kv_cache_bytes} cannot hold one sequence of {max_len} tokens: {blocks} blocks "
            f"× {KV_BLOCK_TOKENS} tokens × {per_token} bytes = {blocks * block_bytes}",
            "kv_cache_bytes",
        )
    return options.kv_cache_bytes


def _weight_bytes(manifest: Manifest, dtype: str) -> int:
    """Bytes of weights once loaded as `dtype`; quantised tensors keep their own."""
    return sum(
        size * 8 // DTYPE_BITS[stored] * DTYPE_BYTES[dtype] if stored in _CAST else size
        for stored, size in manifest.bytes_by_dtype.items()
    )


def _architecture(path: str, config: dict[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise RefusedCheckpoint(path, "architectures: it names none")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}(ForCausalLM|LMHeadModel)", named[0]):
        raise RefusedCheckpoint(path, f"architectures: {shown(named[0])} is no causal language model")
    return named[0]


def _dtype(path: str, config: dict[str, Any], manifest: Manifest) -> str:
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    named = config.get(field)
    if named is None:  # old configurations leave it out; then the weights tell
        largest = next(iter(manifest.bytes_by_dtype))
        named = _SAFETENSORS_NAMES.get(largest, largest)
    if not isinstance(named, str) or named not in DTYPE_BYTES:
        raise RefusedCheckpoint(path, f"{field}: {shown(named)} is none of {', '.join(DTYPE_BYTES)}")
    return named


def _positive(path: str, config: dict[str, Any], field: str, *, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        nested = "; text_config has it: multimodal models are not served" if field in _text_config(config) else ""
        raise RefusedCheckpoint(path, f"{field} is missing{nested}")
    if type(value) is not int or not 0 < value < 2**31:
        raise RefusedCheckpoint(path, f"{field}: {shown(value)} is no positive number")
    return value


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _check(options: ModelOptions) -> None:
    def refuse(param: str, meaning: str) -> InvalidRequest:
        return InvalidRequest(f"{param} {getattr(options, param)} must be {meaning}", param)

    if options.engine is EngineKind.UNKNOWN:
        raise refuse("engine", "vllm or sim")
    if options.dtype != "auto" and options.dtype not in DTYPE_BYTES:
        raise refuse("dtype", f"auto, {', '.join(DTYPE_BYTES)}")
    if not 1 <= options.slots <= SLOTS_MAX:
        raise refuse("slots", f"from 1 to {SLOTS_MAX}")
    if not 0 <= options.queue_max <= QUEUE_MAX:
        raise refuse("queue_max", f"from 0 to {QUEUE_MAX}")
    if options.kv_cache_bytes is not None and not 0 < options.kv_cache_bytes <= KV_CACHE_BYTES_MAX:
        raise refuse("kv_cache_bytes", f"from 1 to {KV_CACHE_BYTES_MAX}")
    if options.tensor_parallel != 1:  # placement and the loader know more, the engine's process does not yet
        raise refuse("tensor_parallel", "1: an instance runs on one device")
    if not 1 <= options.max_replicas <= REPLICAS_MAX:
        raise refuse("max_replicas", f"from 1 to {REPLICAS_MAX}")
    if not 0 <= options.min_replicas <= options.max_replicas:
        raise refuse("min_replicas", f"from 0 to {options.max_replicas}, which is max_replicas")
    if not 0 <= options.target_concurrency <= SLOTS_MAX:  # false for NaN, too
        raise refuse("target_concurrency", f"from 0 to {SLOTS_MAX}")
    for param in ("keep_alive_s", "wait_s"):
        if not 0 <= getattr(options, param) <= SECONDS_MAX:  # false for NaN, too
            raise refuse(param, f"from 0 to {SECONDS_MAX:g} seconds")

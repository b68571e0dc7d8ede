"""A complete Hugging Face Llama directory of a few hundred kilobytes, with random weights, written without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

Dtype = Literal["bfloat16", "float32"]
HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
MAX_POSITIONS = 2048


def write_tiny_model(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    vocab_size: int = 512,
    seed: int = 0,
    shards: int = 1,
    dtype: Dtype = "bfloat16",
    tokenizer: bool = True,
) -> Path:
    """Write config.json, generation_config.json, weights and (unless told otherwise) tokenizer files; returns `directory`.

    hidden: a multiple of 64, so that it has an even number of heads of 32; half as many key/value heads.
    seed: the same seed gives the same bytes.  shards > 1 writes an index as well.
    The answer of such a model is noise, but greedy sampling of it is deterministic.
    """
    if hidden % (2 * HEAD_DIM) or layers < 1 or shards < 1:
        raise ValueError(f"layers {layers}, hidden {hidden}, shards {shards}: hidden must be a multiple of 64")
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(layers, hidden, vocab_size, dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_weights(directory, _weights(layers, hidden, vocab_size, seed), shards, dtype)
    if tokenizer:
        from tests.support.tiny_tokenizer import write_tokenizer

        write_tokenizer(directory, vocab_size)
    return directory


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """name → (dtype as safetensors names it, shape, little-endian bytes), laid out in the order given."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for _, _, data in tensors.values():
            out.write(data)


def _config(layers: int, hidden: int, vocab_size: int, dtype: Dtype) -> dict[str, object]:
    heads = hidden // HEAD_DIM
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads // 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _weights(layers: int, hidden: int, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    kv, inner = hidden // 2, 2 * hidden
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Unit-variance outputs: logits spread enough that greedy choices are no near-ties.
        values: np.ndarray = generator.standard_normal((rows, columns)) / np.sqrt(columns)
        return values.astype(np.float32)

    weights = {"model.embed_tokens.weight": generator.standard_normal((vocab_size, hidden)).astype(np.float32)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{at}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{at}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{at}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{at}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{at}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(kv, hidden),
        }
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = matrix(vocab_size, hidden) * np.float32(4.0)
    return weights


def _write_weights(directory: Path, weights: dict[str, np.ndarray], shards: int, dtype: Dtype) -> None:
    encoded = {name: _encode(array, dtype) for name, array in weights.items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", encoded)
        return
    names = list(encoded)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        write_safetensors(directory / file, {name: encoded[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    index = {
        "metadata": {"total_size": sum(len(data) for _, _, data in encoded.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _encode(array: np.ndarray, dtype: Dtype) -> tuple[str, tuple[int, ...], bytes]:
    if dtype == "float32":
        return "F32", array.shape, array.astype("<f4").tobytes()
    # bfloat16 is the upper half of a float32, rounded to nearest even.
    bits = array.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return "BF16", array.shape, rounded.astype("<u2").tobytes()

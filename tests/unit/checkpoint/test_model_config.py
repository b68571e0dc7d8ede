from typing import Any

import pytest

from stoker_checkpoint.header import Shard, TensorRef
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.model_config import ModelConfig, model_spec, read_config
from stoker_contracts.models import EngineKind, ModelOptions, ModelSpec
from stoker_core.errors import InvalidRequest, RefusedCheckpoint

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
WEIGHT_BYTES = 269_030_016
DERIVED = ModelOptions()


def checkpoint(stored: str = "BF16", *, without: str = "", **changes: Any) -> tuple[dict[str, Any], Manifest]:
    """A configuration, and the manifest of weights that go with it."""
    config = {key: value for key, value in {**SMOLLM2_135M, **changes}.items() if key != without}
    tensor = TensorRef(name="w", dtype=stored, shape=(1,), shard="s", offset_bytes=8, size_bytes=WEIGHT_BYTES)
    shard = Shard(name="s", size_bytes=WEIGHT_BYTES + 8, data_offset_bytes=8, tensors=(tensor,), metadata={})
    return config, Manifest(shards=(shard,))


def read(**changes: Any) -> ModelConfig:
    return read_config("s3://models/m", *checkpoint(**changes))


def spec(options: ModelOptions = DERIVED, **changes: Any) -> ModelSpec:
    return model_spec("smol", "model-1", "file:///m", *checkpoint(**changes), options)


def test_smollm2_135m_has_the_numbers_that_are_known_of_it() -> None:
    made = spec()
    assert made.architecture == "LlamaForCausalLM"
    assert made.dtype == "bfloat16"
    assert made.kv_bytes_per_token == 23_040
    assert made.max_model_len == 8192
    assert made.kv_cache_bytes == (64 + 4) * 128 * 23_040
    assert made.weight_bytes == WEIGHT_BYTES
    assert made.vocab_size == 49152


def test_the_default_kv_cache_holds_whole_blocks_and_four_to_spare() -> None:
    assert spec(ModelOptions(max_model_len=129)).kv_cache_bytes == (2 + 4) * 128 * 23_040


def test_long_contexts_must_be_asked_for() -> None:
    assert spec(max_position_embeddings=131_072).max_model_len == 8192
    assert spec(ModelOptions(max_model_len=100_000), max_position_embeddings=131_072).max_model_len == 100_000
    assert spec(max_position_embeddings=2048).max_model_len == 2048


@pytest.mark.parametrize("asked", [8193, 0, -1])
def test_a_context_that_the_model_does_not_have_is_refused(asked: int) -> None:
    with pytest.raises(InvalidRequest, match="8192") as caught:
        spec(ModelOptions(max_model_len=asked))
    assert caught.value.param == "max_model_len"


def test_a_kv_cache_that_holds_no_whole_sequence_is_refused_with_the_arithmetic() -> None:
    need = 64 * 128 * 23_040
    with pytest.raises(InvalidRequest, match=rf"64 blocks × 128 tokens × 23040 bytes = {need}") as caught:
        spec(ModelOptions(kv_cache_bytes=need - 1))
    assert caught.value.param == "kv_cache_bytes"
    assert spec(ModelOptions(kv_cache_bytes=need)).kv_cache_bytes == need


def test_another_dtype_changes_weights_and_kv_cache() -> None:
    made = spec(ModelOptions(dtype="float32"))
    assert made.dtype == "float32"
    assert made.kv_bytes_per_token == 46_080
    assert made.weight_bytes == 2 * WEIGHT_BYTES


def test_quantised_weights_keep_their_size() -> None:
    assert spec(ModelOptions(dtype="float32"), stored="F8_E4M3").weight_bytes == WEIGHT_BYTES


def test_an_explicit_head_dim_wins_and_kv_heads_default_to_heads() -> None:
    assert spec(head_dim=128).kv_bytes_per_token == 30 * 3 * 128 * 2 * 2
    assert spec(without="num_key_value_heads").kv_bytes_per_token == 30 * 9 * 64 * 2 * 2


def test_the_dtype_is_read_by_either_name_and_else_from_the_weights() -> None:
    assert spec(dtype="float16").dtype == "float16"
    assert spec(without="torch_dtype").dtype == "bfloat16"
    assert spec(without="torch_dtype", stored="F32").dtype == "float32"
    with pytest.raises(RefusedCheckpoint, match="torch_dtype: 'I8' is none of"):
        spec(without="torch_dtype", stored="I8")


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "architectures",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(RefusedCheckpoint, match=f"s3://models/m/config.json: {field}"):
        read(without=field)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "576"}, "hidden_size: '576' is no positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"vocab_size": True}, "vocab_size: True"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": 575}, "no multiple"),
        ({"architectures": ["BertModel"]}, "'BertModel' is no causal language model"),
        ({"architectures": []}, "architectures: it names none"),
        ({"torch_dtype": "int8"}, "torch_dtype: 'int8'"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"num_hidden_layers": 2**30, "head_dim": 2**30}, "bytes per token"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedCheckpoint, match=reason):
        read(**changes)


def test_a_multimodal_model_is_refused_as_such() -> None:
    with pytest.raises(RefusedCheckpoint, match="hidden_size is missing; text_config has it: multimodal"):
        read(without="hidden_size", text_config={"hidden_size": 576})


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (ModelOptions(dtype="int4"), "dtype"),
        (ModelOptions(kv_cache_bytes=2**64), "kv_cache_bytes"),
        (ModelOptions(slots=0), "slots"),
        (ModelOptions(queue_max=-1), "queue_max"),
        (ModelOptions(keep_alive_s=-1.0), "keep_alive_s"),
        (ModelOptions(wait_s=float("nan")), "wait_s"),
        (ModelOptions(engine=EngineKind.UNKNOWN), "engine"),
    ],
)
def test_an_option_that_cannot_be_met_is_named(options: ModelOptions, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec(options)
    assert caught.value.param == param

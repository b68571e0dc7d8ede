from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.gateway_rig import model_spec
from tests.support.tiny_tokenizer import END_ID, write_tokenizer

from stoker_core.errors import InvalidRequest, InvalidSettings, PromptTooLong, TokenizerFailed
from stoker_core.settings import load as load_settings
from stoker_gateway.app import cache_salt
from stoker_gateway.openai.requests import Params, parse_completion
from stoker_gateway.prepare import sampling_of
from stoker_gateway.settings import GatewaySettings
from stoker_gateway.text.model_text import ModelText, load

SPEC = model_spec(max_model_len=100)


def params(body: str = "") -> Params:
    return parse_completion(b'{"model": "m", "prompt": "x"' + body.encode() + b"}").params


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (directory / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    return load("tiny", directory)


def test_without_max_tokens_the_rest_of_the_context_is_asked_for() -> None:
    assert sampling_of(params(), 60, SPEC, (), field="prompt").max_tokens == 40


def test_prompt_and_completion_may_fill_the_context_and_no_more() -> None:
    assert sampling_of(params(', "max_tokens": 1'), 99, SPEC, (), field="prompt").max_tokens == 1
    with pytest.raises(PromptTooLong) as caught:
        sampling_of(params(', "max_tokens": 2'), 99, SPEC, (), field="prompt")
    assert caught.value.param == "max_tokens"


def test_a_prompt_that_leaves_no_room_is_refused_with_its_length() -> None:
    with pytest.raises(PromptTooLong, match="100") as caught:
        sampling_of(params(), 100, SPEC, (), field="messages")
    assert caught.value.param == "messages"


def test_end_tokens_come_from_tokenizer_and_configurations(text: ModelText) -> None:
    assert text.stop_token_ids == (0, END_ID, 7)


def test_a_chat_is_rendered_with_the_models_template(text: ModelText) -> None:
    rendered = text.render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text.decode(text.encode(rendered, add_special_tokens=False)) == "user\nhi\nassistant\n"


def test_what_the_template_refuses_names_the_messages(text: ModelText) -> None:
    with pytest.raises(InvalidRequest, match="unknown role") as caught:
        text.render([{"role": "developer", "content": "hi"}])
    assert caught.value.param == "messages"


def test_files_that_make_no_tokenizer_are_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerFailed):
        load("broken", tmp_path)


def test_the_cache_salt_tells_tenants_apart_and_is_the_same_on_every_gateway() -> None:
    assert cache_salt("s", "a") == cache_salt("s", "a")
    assert cache_salt("s", "a") != cache_salt("s", "b")
    assert cache_salt("s", "a") != cache_salt("t", "a")
    assert cache_salt("", "a") != cache_salt("", "a")


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_settings_out_of_range_are_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidSettings, match="STOKER_GATEWAY_STREAMS_MAX"):
        load_settings(GatewaySettings, {"STOKER_GATEWAY_STREAMS_MAX": value, "STOKER_NODE": "n"})

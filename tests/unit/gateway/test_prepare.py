from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.fake_instance import model_spec

from stoker_contracts.models import ModelSpec
from stoker_core.errors import InvalidRequest, InvalidSettings, PromptTooLong
from stoker_core.settings import load as load_settings
from stoker_gateway.openai.requests import Params, parse_chat, parse_completion
from stoker_gateway.prepare import Preparer, sampling_of
from stoker_gateway.salt import cache_salt
from stoker_gateway.settings import GatewaySettings

SPEC = model_spec(max_model_len=100)


def params(body: str = "") -> Params:
    return parse_completion(b'{"model": "m", "prompt": "x"' + body.encode() + b"}").params


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


class Overflowing:
    """A tokenizer that knows more tokens than the model: what comes out of it would end the engine."""

    stop_token_ids = ()

    def render(self, messages: object) -> str:
        return "<|made-up|>"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [5, SPEC.vocab_size]

    async def get(self, spec: ModelSpec) -> Any:
        return self


@pytest.mark.parametrize(
    "prompt", ['"prompt": "x"', '"prompt": [5, 512]', '"messages": [{"role": "user", "content": "x"}]']
)
async def test_no_token_outside_the_vocabulary_leaves_the_gateway(prompt: str) -> None:
    parse = parse_chat if "messages" in prompt else parse_completion
    with ThreadPoolExecutor(1) as threads, pytest.raises(InvalidRequest, match="vocabulary") as caught:
        await Preparer(Overflowing(), threads).prepare("r", parse(f'{{"model": "m", {prompt}}}'.encode()), SPEC)
    assert caught.value.param in prompt


def test_the_cache_salt_tells_tenants_apart_and_is_the_same_on_every_gateway() -> None:
    assert cache_salt("s", "a") == cache_salt("s", "a")
    assert cache_salt("s", "a") != cache_salt("s", "b")
    assert cache_salt("s", "a") != cache_salt("t", "a")
    assert cache_salt("", "a") != cache_salt("", "a")


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_settings_out_of_range_are_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidSettings, match="STOKER_GATEWAY_STREAMS_MAX"):
        load_settings(GatewaySettings, {"STOKER_GATEWAY_STREAMS_MAX": value, "STOKER_NODE": "n"})

"""What bodies mean, and how each wrong one is refused: by the name of its field."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker_core.errors import InvalidRequest
from stoker_gateway.openai.requests import ChatRequest, CompletionRequest, parse_chat, parse_completion

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def complete(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def test_defaults_are_openais() -> None:
    params = chat().params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.stop) == (1.0, 1.0, 0, None, ())
    assert (params.max_tokens, params.stream, params.include_usage, params.ignore_eos) == (None, False, False, False)


def test_values_are_taken() -> None:
    params = chat(
        temperature=0,
        top_p=0.25,
        top_k=-1,
        seed=-5,
        stop="end",
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
        user="me",
    ).params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.stop) == (0.0, 0.25, 0, -5, ("end",))
    assert (params.max_tokens, params.stream, params.include_usage, params.ignore_eos) == (9, True, True, True)


def test_null_counts_as_absent() -> None:
    nulls = dict.fromkeys(
        ["temperature", "max_tokens", "stop", "tools", "seed", "logprobs", "response_format", "stream", "made_up"]
    )
    assert chat(**nulls) == chat()


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts, "name": "x"}]).messages == (
        {"role": "user", "content": "a\nb", "name": "x"},
    )


@pytest.mark.parametrize(
    ("prompt", "meant"), [("a", "a"), (["a"], "a"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ("", ""), ([], ())]
)
def test_prompts_are_text_or_token_ids(prompt: Any, meant: Any) -> None:
    assert complete(prompt=prompt).prompt == meant


NO_OP_CHAT: list[tuple[str, Any]] = [
    ("frequency_penalty", 0),
    ("frequency_penalty", 0.0),
    ("presence_penalty", 0),
    ("n", 1),
    ("logit_bias", {}),
    ("logprobs", False),
    ("top_logprobs", 0),
    ("tools", []),
    ("tool_choice", "none"),
    ("functions", []),
    ("response_format", {"type": "text"}),
    ("service_tier", "auto"),
    ("modalities", ["text"]),
    ("store", False),
    ("metadata", {}),
    ("parallel_tool_calls", True),
]


@pytest.mark.parametrize(("field", "value"), NO_OP_CHAT)
def test_parameters_that_do_nothing_at_a_value_are_accepted_at_it(field: str, value: Any) -> None:
    assert chat(**{field: value}) == chat()


WRONG_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{**USER, "name": 5}]}, "messages[0].name"),
    ({"messages": [{**USER, "made_up": 5}]}, "messages[0].made_up"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": True}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"made_up": 1}}, "stream_options.made_up"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"user": 5}, "user"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"made_up": 1}, "made_up"),
    ({"prompt": "hi"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_CHAT, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_in_a_chat_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


WRONG_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [[1], [2]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [[1, [2]]]}, "prompt"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"logprobs": 1}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": [USER]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_COMPLETION, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_in_a_completion_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 10**6, b'{"a": 1e999}']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "stop", "stream", "stream_options", "n", "max_tokens", "x"]),
        json_values,
    )
)
def test_any_json_is_taken_or_refused_and_never_breaks(fields: dict[str, Any]) -> None:
    for parse in (chat, complete):
        with contextlib.suppress(InvalidRequest):
            assert parse(**fields).params.model

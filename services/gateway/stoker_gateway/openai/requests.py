"""Bodies of /v1/chat/completions and /v1/completions, validated field by field."""

from __future__ import annotations

from typing import Any

import msgspec

from stoker_core.errors import InvalidRequest
from stoker_gateway.openai.fields import Fields, decode_object, kind_of

ROLES = ("system", "developer", "user", "assistant")
STOPS_MAX = 4
STOP_CHARS_MAX = 1024
_INT64 = 2**63

# Parameters of OpenAI's API that change nothing at these values, and are refused by name at any other.
_NO_OP_BOTH: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "presence_penalty": (0,),
}
_NO_OP_CHAT: dict[str, tuple[object, ...]] = {
    **_NO_OP_BOTH,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_NO_OP_COMPLETION: dict[str, tuple[object, ...]] = {
    **_NO_OP_BOTH,
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}
_NO_OP_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """What both routes share. max_tokens None: what is left of the context."""

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    params: Params
    messages: tuple[dict[str, str], ...]


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    params: Params
    prompt: str | tuple[int, ...]


def parse_chat(body: bytes) -> ChatRequest:
    """Raises InvalidRequest naming the field."""
    fields = Fields(decode_object(body))
    request = ChatRequest(params=_params(fields), messages=_messages(fields))
    _refuse_others(fields, _NO_OP_CHAT)
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest naming the field."""
    fields = Fields(decode_object(body))
    request = CompletionRequest(params=_params(fields), prompt=_prompt(fields))
    _refuse_others(fields, _NO_OP_COMPLETION)
    return request


def _refuse_others(fields: Fields, no_op: dict[str, tuple[object, ...]]) -> None:
    for field, allowed in no_op.items():
        fields.only(field, *allowed)
    fields.refuse_rest()


def _params(fields: Fields) -> Params:
    fields.string("user")
    stream = fields.boolean("stream")
    top_k = fields.integer("top_k", least=-1, most=2**31 - 1) or 0
    return Params(
        model=fields.required_string("model"),
        max_tokens=_max_tokens(fields),
        temperature=fields.number("temperature", 1.0, least=0, most=2),
        top_p=fields.number("top_p", 1.0, least=0, most=1, open_below=True),
        top_k=max(top_k, 0),  # -1 says "all" as well
        seed=fields.integer("seed", least=-_INT64, most=_INT64 - 1),
        stop=_stops(fields),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", least=1, most=2**31 - 1)
    new = fields.integer("max_completion_tokens", least=1, most=2**31 - 1)
    if old is not None and new is not None and old != new:
        raise fields.refuse("max_tokens", "differs from max_completion_tokens")
    return new if old is None else old


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.refuse("stop", "must be a string or an array of strings")
    if len(stops) > STOPS_MAX:
        raise fields.refuse("stop", f"has {len(stops)} strings; the limit is {STOPS_MAX}")
    if not all(0 < len(stop) <= STOP_CHARS_MAX for stop in stops):
        raise fields.refuse("stop", f"each string must have from 1 to {STOP_CHARS_MAX} characters")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise fields.refuse("stream_options", f"must be an object, not {kind_of(value)}")
    if not stream:
        raise fields.refuse("stream_options", "only allowed when stream is true")
    options = Fields(value, "stream_options")
    include_usage = options.boolean("include_usage")
    options.only("include_obfuscation", False)
    options.refuse_rest()
    return include_usage


def _messages(fields: Fields) -> tuple[dict[str, str], ...]:
    value = fields.take("messages")
    if not isinstance(value, list):
        raise fields.refuse("messages", "is required" if value is None else f"must be an array, not {kind_of(value)}")
    if not value:
        raise fields.refuse("messages", "must hold at least one message")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: must be an object, not {kind_of(value)}", path)
    fields = Fields(value, path)
    role = fields.required_string("role")
    if role not in ROLES:
        raise fields.refuse("role", f"{role!r} is none of {', '.join(ROLES)}")
    message = {"role": role, "content": _content(fields)}
    if name := fields.string("name"):
        message["name"] = name
    _refuse_others(fields, _NO_OP_MESSAGE)
    return message


def _content(fields: Fields) -> str:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        what = "is required" if value is None else f"must be a string or an array of text parts, not {kind_of(value)}"
        raise fields.refuse("content", what)
    return "\n".join(_text_part(part, f"{fields.name('content')}[{i}]") for i, part in enumerate(value))


def _text_part(value: Any, path: str) -> str:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: must be an object, not {kind_of(value)}", path)
    fields = Fields(value, path)
    kind = fields.required_string("type")
    if kind != "text":
        raise fields.refuse("type", f"{kind!r} is not supported; only 'text' is")
    text = fields.string("text")
    if text is None:
        raise fields.refuse("text", "is required")
    fields.only("prompt_cache_breakpoint")
    fields.refuse_rest()
    return text


def _prompt(fields: Fields) -> str | tuple[int, ...]:
    value = fields.take("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if value is None:
        raise fields.refuse("prompt", "is required")
    if not isinstance(value, list):
        raise fields.refuse("prompt", f"must be a string or an array of token ids, not {kind_of(value)}")
    if value and isinstance(value[0], str | list):
        raise fields.refuse("prompt", f"holds {len(value)} prompts; one a request is supported")
    if not all(type(token) is int and token >= 0 for token in value):
        raise fields.refuse("prompt", "must be a string or an array of token ids")
    return tuple(value)

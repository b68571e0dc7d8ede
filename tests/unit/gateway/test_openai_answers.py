from __future__ import annotations

import json

import pytest

from stoker_core.errors import (
    InstanceLost,
    InvalidRequest,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    PromptTooLong,
    StokerError,
    Stopping,
)
from stoker_gateway.openai.answers import Shape, Usage
from stoker_gateway.openai.errors import body_of, retry_after_s, status_of

USAGE = Usage(3, 2)


def shape(*, chat: bool = True, include_usage: bool = False) -> Shape:
    return Shape(chat=chat, answer_id="a-1", created_s=5, model="m", include_usage=include_usage)


def events(data: bytes) -> list[object]:
    lines = data.decode().strip().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_every_chunk_of_a_chat_carries_the_same_head() -> None:
    one = shape()
    found = events(one.first() + one.delta("x") + one.last("stop", USAGE))
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in found} == {  # type: ignore[index]
        ("a-1", "chat.completion.chunk", 5, "m")
    }


def test_usage_comes_in_a_chunk_of_its_own_only_if_asked_for() -> None:
    assert all("usage" not in c for c in events(shape().last("stop", USAGE)))  # type: ignore[operator]
    finish, usage = events(shape(include_usage=True).last("length", USAGE))
    assert finish["usage"] is None  # type: ignore[index]
    assert usage["choices"] == []  # type: ignore[index]
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}  # type: ignore[index]


def test_a_stream_ends_with_its_mark() -> None:
    assert shape(chat=False).last("stop", USAGE).endswith(b"data: [DONE]\n\n")


def test_line_breaks_in_text_do_not_break_events() -> None:
    (chunk,) = events(shape(chat=False).delta("a\n\ndata: [DONE]\n\n"))
    assert chunk["choices"][0]["text"] == "a\n\ndata: [DONE]\n\n"  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (InvalidRequest("x", "seed"), 400, None),
        (PromptTooLong("x", "messages"), 400, None),
        (ModelNotFound("m"), 404, None),
        (Overloaded("the queue", 1500), 429, 2),
        (InstanceLost(), 502, None),
        (NoCapacity("m", 60_000, "no memory"), 503, 1),
        (Stopping(), 503, 1),
        (StokerError("defect"), 500, None),
    ],
)
def test_errors_become_openais(error: StokerError, status: int, retry_after: int | None) -> None:
    body = body_of(error)["error"]
    assert status_of(error.code) == status
    assert retry_after_s(error) == retry_after
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["message"], body["code"]) == (error.message, error.code)


def test_the_wrong_field_is_named() -> None:
    assert body_of(InvalidRequest("x", "seed"))["error"]["param"] == "seed"
    assert body_of(ModelNotFound("m"))["error"]["param"] == "model"

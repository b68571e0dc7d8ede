"""Answers of the two routes, whole and in chunks."""

from __future__ import annotations

from typing import Any

import msgspec

from stoker_contracts.models import ModelSpec

DONE = b"data: [DONE]\n\n"


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer is written: ids, the time and the model are the same in all of its chunks."""

    chat: bool
    answer_id: str
    created_s: int
    model: str
    include_usage: bool = False

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head(chunk=False), "choices": [choice], "usage": usage.body()}

    def first(self) -> bytes:
        """What comes before any text: a chat says who speaks."""
        return self._event([self._choice({"role": "assistant", "content": ""}, None)]) if self.chat else b""

    def delta(self, text: str) -> bytes:
        return self._event([self._choice({"content": text} if self.chat else text, None)])

    def last(self, finish: str, usage: Usage) -> bytes:
        """The finish reason, the usage if asked for, and the end mark."""
        end = self._event([self._choice({} if self.chat else "", finish)])
        if self.include_usage:
            end += self._event([], usage)
        return end + DONE

    def _choice(self, said: Any, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "delta" if self.chat else "text": said, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        body = {**self._head(chunk=True), "choices": choices}
        if self.include_usage:
            body["usage"] = usage.body() if usage else None
        return event(body)

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.answer_id, "object": kind, "created": self.created_s, "model": self.model}


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def model_card(spec: ModelSpec) -> dict[str, Any]:
    return {
        "id": spec.name,
        "object": "model",
        "created": 0,  # registrations carry no time
        "owned_by": "stoker",
        "max_model_len": spec.max_model_len,
    }

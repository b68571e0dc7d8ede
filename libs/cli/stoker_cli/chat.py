"""`stoker chat`: one answer, or a conversation, streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import aiohttp
import msgspec
from rich.console import Console

from stoker_cli.client import connect, failure
from stoker_core.clock import Clock, SystemClock
from stoker_core.errors import ApiFailed

T = TypeVar("T")
Chat = list[dict[str, str]]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Of every answer. None: the gateway's default."""

    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


async def ask(url: str, options: Options, messages: Chat, notes: Console, clock: Clock) -> str:
    """Stream one answer to standard output and return it; timing goes to `notes`.

    Raises ApiFailed (also for an error in mid-stream) and NotRunning.
    """
    asked = {key: value for key, value in msgspec.structs.asdict(options).items() if value is not None}
    body = {**asked, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    began_s, first_s, tokens = clock.monotonic_s(), None, 0
    pieces: list[str] = []
    async with connect(url, timeout_s=None) as gateway, gateway.open("POST", "/v1/chat/completions", body) as response:
        chunks = aiter(sse(response.content))
        chunk = await _with_elapsed(anext(chunks, None), options.model, notes, clock)
        while chunk is not None:
            text = delta(chunk)
            if text:
                first_s = clock.monotonic_s() if first_s is None else first_s
                pieces.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            chunk = await anext(chunks, None)
    sys.stdout.write("\n")
    notes.print(summary(began_s, first_s, clock.monotonic_s(), tokens), style="dim", highlight=False)
    return "".join(pieces)


async def _with_elapsed(first: Awaitable[T], model: str, notes: Console, clock: Clock) -> T:
    """Await the first chunk, showing on a terminal for how long a model that must start is waited for."""
    waiting = asyncio.ensure_future(first)
    began_s = clock.monotonic_s()
    try:
        with notes.status(f"{model} …") as status:
            while not (await asyncio.wait({waiting}, timeout=0.1))[0]:
                status.update(f"{model}: waiting for the first token, {clock.monotonic_s() - began_s:.1f} s")
        return waiting.result()
    finally:
        waiting.cancel()


def summary(began_s: float, first_s: float | None, ended_s: float, tokens: int) -> str:
    """'first token after 1.42 s · 12 tokens in 2.0 s'"""
    if first_s is None:
        return f"no token in {ended_s - began_s:.2f} s"
    text = f"first token after {first_s - began_s:.2f} s"
    return f"{text} · {tokens} tokens in {ended_s - began_s:.1f} s" if tokens else text


def delta(chunk: dict[str, Any]) -> str:
    """The text that a chunk adds. Raises ApiFailed if it carries an error instead."""
    if "error" in chunk:
        raise failure(500, json.dumps(chunk))
    choices = chunk.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


async def sse(lines: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line up to `[DONE]`. Raises ApiFailed if the stream ends without it."""
    async for raw in lines:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data:"):
            try:
                yield json.loads(line.removeprefix("data:"))
            except ValueError as error:
                raise ApiFailed(f"the gateway's stream is not understood: {line[:80]!r}", status=200) from error
    raise ApiFailed("the gateway's stream broke off", status=200)


def run(url: str, options: Options, prompt: str | None, system: str | None) -> None:
    """One answer to `prompt`, or without one a conversation until end of input (Ctrl-D)."""
    notes, clock = Console(stderr=True), SystemClock()
    messages: Chat = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        asyncio.run(ask(url, options, [*messages, {"role": "user", "content": prompt}], notes, clock))
        return
    if sys.stdin.isatty():
        notes.print(f"Talking to {options.model}. Ctrl-C ends an answer, Ctrl-D the conversation.", style="dim")
    while (said := _read()) is not None:
        if not said.strip():
            continue
        question = {"role": "user", "content": said}
        try:
            answer = asyncio.run(ask(url, options, [*messages, question], notes, clock))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except ApiFailed as error:
            notes.print(f"stoker: {error.message}", markup=False, highlight=False)
            continue
        messages += [question, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None

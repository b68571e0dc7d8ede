"""Calls to a gateway's HTTP API. Errors come back as ApiFailed or NotRunning, in one readable line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from stoker_core.errors import ApiFailed, NotRunning

A = TypeVar("A")


class Gateway:
    """One gateway, by its base URL. Use inside `async with connect(url)`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url.rstrip("/")
        self._session = session

    async def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON. Raises ApiFailed on an error status, NotRunning if nobody listens."""
        async with self.open(method, path, body) as response:
            return await _body(response)

    async def get(self, path: str, kind: type[A]) -> A:
        """The answer as `kind`. Raises ApiFailed, also if it has another form, and NotRunning."""
        return parse(await self.json("GET", path), kind)

    async def status(self, path: str) -> int:
        """The HTTP status alone, 0 if nobody listens."""
        try:
            async with self._session.get(self._url + path) as response:
                return response.status
        except (aiohttp.ClientConnectionError, TimeoutError):
            return 0

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response whose body is still to be read. Raises as `json` does."""
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                if response.status >= 400:
                    raise failure(response.status, await response.text())
                yield response
        except aiohttp.ClientConnectorError as error:
            raise NotRunning(f"nobody answers at {self._url}: {error.os_error.strerror or error}") from error
        except aiohttp.ClientError as error:
            raise NotRunning(f"the connection to {self._url} broke: {error}") from error


@asynccontextmanager
async def connect(url: str, *, timeout_s: float | None = 30.0) -> AsyncIterator[Gateway]:
    """timeout_s: for a whole answer; None for streams that may last."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Gateway(url, session)


def parse(answer: Any, kind: type[A]) -> A:
    """JSON as `kind`. Raises ApiFailed if it has another form."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise ApiFailed(f"the gateway's answer is not understood: {error}", status=200) from error


async def _body(response: aiohttp.ClientResponse) -> Any:
    text = await response.text()
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise ApiFailed(f"the gateway's answer is no JSON: {text[:80]!r}", status=response.status) from error


def failure(status: int, text: str) -> ApiFailed:
    """An error answer (OpenAI's shape) as an error."""
    try:
        error = json.loads(text)["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"HTTP {status}: {text.strip()[:200] or 'no body'}", None, None
    if param and param not in message:
        message = f"{param}: {message}"
    return ApiFailed(message, status=status, remote_code=str(code or ""))

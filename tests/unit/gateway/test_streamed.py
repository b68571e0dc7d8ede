"""A stream that broke, towards a client that reads no more."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from stoker_core.clock import ManualClock
from stoker_core.errors import ClientTooSlow, EngineFailed, StokerError
from stoker_gateway.openai.answers import Shape, Usage
from stoker_gateway.web.exchange import Exchange
from stoker_gateway.web.middleware import CLIENT_GONE
from stoker_gateway.web.v1 import OpenAiRoutes


class Broken:
    """A generation that fails at once."""

    usage = Usage(1, 0)

    def __init__(self, error: StokerError) -> None:
        self._error = error

    async def piece(self) -> str | None:
        raise self._error


class Stalled(OpenAiRoutes):
    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        raise TimeoutError


@pytest.mark.parametrize("error", [ClientTooSlow(), EngineFailed()])
async def test_an_error_that_cannot_be_told_ends_the_connection_and_nothing_else(error: StokerError) -> None:
    unused: Any = None
    routes = Stalled(unused, unused, unused, unused, ManualClock(), client_stall_s=1.0)
    request = make_mocked_request("POST", "/v1/completions")
    exchange = Exchange("req-1", ManualClock(), 0.0)
    shape = Shape(chat=False, answer_id="cmpl-1", created_s=0, model="m")
    broken: Any = Broken(error)
    await routes._streamed(request, exchange, shape, broken)
    assert exchange.status == CLIENT_GONE
    assert request.transport is not None
    request.transport.abort.assert_called_once()  # type: ignore[attr-defined]

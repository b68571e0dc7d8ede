"""Around every route: an id, one line in the log, one count, and every error in OpenAI's shape."""

from __future__ import annotations

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from stoker_core.clock import Clock
from stoker_core.errors import StokerError
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_core.tracing import span
from stoker_gateway.metrics import Metrics
from stoker_gateway.openai.errors import body_of, error_body, retry_after_s, status_of
from stoker_gateway.web.exchange import EXCHANGE, Exchange

log = get_logger("http")

CLIENT_GONE = 499
"""Status that is counted and logged when a client left before its answer."""
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def json_response(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def error_response(error: StokerError) -> web.Response:
    response = json_response(body_of(error), status_of(error.code))
    if (after_s := retry_after_s(error)) is not None:
        response.headers["Retry-After"] = str(after_s)
    return response


def observing(clock: Clock, ids: Ids, metrics: Metrics) -> Middleware:
    """The outermost middleware."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = Exchange(ids.new("req"), clock, clock.monotonic_s())
        request[EXCHANGE] = exchange
        route = request.match_info.route.resource
        name = route.canonical if route is not None else "none"
        status = CLIENT_GONE  # unless an answer comes about
        try:
            with span("gateway.request", headers=request.headers, route=name, request_id=exchange.request_id):
                response = await _answered(request, handler, exchange)
            status = response.status
            return response
        finally:
            if name.startswith(("/v1/", "/admin/")):
                exchange.close(request.method, name, status, metrics)

    return observe


async def _answered(request: web.Request, handler: Handler, exchange: Exchange) -> web.StreamResponse:
    try:
        return await handler(request)
    except StokerError as error:
        exchange.error = error.code
        return error_response(error)
    except web.HTTPException as error:
        exchange.error = _HTTP_CODES.get(error.status, "http_error")
        response = json_response(error_body(error.status, exchange.error, _http_message(request, error)), error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # the client is gone; nothing can be answered
    except Exception:  # a defect here must not look like a broken connection there
        exchange.error = "internal"
        log.exception("request_failed", request=exchange.request_id)
        return json_response(error_body(500, "internal", f"internal error; request {exchange.request_id}"), 500)


def _http_message(request: web.Request, error: web.HTTPException) -> str:
    if error.status == 404:
        return f"there is no {request.path}"
    if error.status == 405:
        return f"{request.method} is not allowed on {request.path}"
    return error.text or error.reason


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The signal before a head is sent, of answers and streams alike."""
    exchange = request.get(EXCHANGE)
    if exchange is not None:
        response.headers["x-request-id"] = exchange.request_id
        if timing := exchange.server_timing():
            response.headers["Server-Timing"] = timing

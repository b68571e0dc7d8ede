"""Stoker's errors as OpenAI's: status, body and Retry-After. The one place that knows HTTP."""

from __future__ import annotations

import math
from typing import Any

from stoker_core.errors import NoCapacity, Overloaded, StokerError

_STATUS = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "invalid_model_name": 400,
    "refused_checkpoint": 400,
    "corrupt_checkpoint": 400,
    "source_denied": 403,
    "model_not_found": 404,
    "instance_not_found": 404,
    "model_exists": 409,
    "message_too_large": 413,
    "overloaded": 429,
    "instance_lost": 502,
    "source_unavailable": 502,
    "no_capacity": 503,
    "no_node": 503,
    "no_responders": 503,
    "bus_disconnected": 503,
    "bus_error": 503,
    "database_unavailable": 503,
    "stopping": 503,
    "tier_full": 507,
    "request_timeout": 504,
}
_TYPES = {429: "rate_limit_error", 404: "not_found_error"}
_RETRY_AFTER_S = 1


def status_of(code: str) -> int:
    return _STATUS.get(code, 500)


def error_body(status: int, code: str | None, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: StokerError) -> dict[str, Any]:
    return error_body(status_of(error.code), error.code, error.message, param_of(error))


def param_of(error: StokerError) -> str | None:
    param: str | None = getattr(error, "param", None)
    return "model" if param is None and error.code == "model_not_found" else param


def retry_after_s(error: StokerError) -> int | None:
    """Whole seconds for Retry-After; None where asking again later will not help."""
    if isinstance(error, Overloaded):
        return max(1, math.ceil(error.retry_after_ms / 1000))
    return _RETRY_AFTER_S if isinstance(error, NoCapacity) or status_of(error.code) == 503 else None

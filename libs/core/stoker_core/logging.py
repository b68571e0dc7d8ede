"""Structured logs: events with fields, one JSON object a line, the trace id on every line.

log = get_logger("worker")
log.info("load_done", model="smollm2-135m", bytes=269_000_000, duration_ms=412)
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO, cast

import structlog
from opentelemetry import trace

from stoker_core.errors import InvalidSettings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _StandardError:
    """Whatever `sys.stderr` is when a line is written: it may be replaced, and the old one closed, after the set-up."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _add_trace(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event


def setup_logging(service: str, *, level: str = "info", log_format: str = "auto", **fields: str) -> None:
    """Configure logs of this process, to standard error. `fields` (node, instance, …) go on every line.

    Raises InvalidSettings for an unknown level or format.
    """
    if level not in _LEVELS:
        raise InvalidSettings(f"STOKER_LOG_LEVEL: {level!r} is none of {', '.join(_LEVELS)}")
    if log_format not in ("auto", "json", "console"):
        raise InvalidSettings(f"STOKER_LOG_FORMAT: {log_format!r} is none of auto, json, console")
    stream = cast(TextIO, _StandardError())
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, **fields)
    # Libraries log through the standard module; only what they warn about is of interest.
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(name)s: %(message)s", force=True)


def get_logger(name: str) -> Any:
    """A logger whose lines carry `component=name`."""
    return structlog.get_logger(component=name)

"""W3C trace context from HTTP through message headers to the instance. Spans are exported only where an exporter is configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


def setup_tracing(service: str, **attributes: str) -> None:
    """Make this process create spans as `service`. Called once, at boot."""
    resource = Resource.create({"service.name": f"stoker-{service}", **attributes})
    trace.set_tracer_provider(TracerProvider(resource=resource))


def inject() -> dict[str, str]:
    """Headers (`traceparent`, `tracestate`) that carry the current span; empty outside of one."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers


@contextmanager
def span(
    name: str, *, headers: Mapping[str, str] | None = None, **attributes: str | int | float
) -> Iterator[trace.Span]:
    """A span around a block; its parent is the caller described by `headers`, else the current span."""
    parent = _PROPAGATOR.extract(dict(headers)) if headers else None
    tracer = trace.get_tracer("stoker")
    with tracer.start_as_current_span(name, context=parent, attributes=attributes) as current:
        yield current

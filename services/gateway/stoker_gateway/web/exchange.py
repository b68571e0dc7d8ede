"""What is kept about one HTTP request while it is answered: ids, times, and what to count at its end."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from stoker_core.clock import Clock
from stoker_core.logging import get_logger
from stoker_gateway.metrics import UNKNOWN_MODEL, Metrics
from stoker_gateway.openai.answers import Usage

log = get_logger("http")


@dataclass
class Exchange:
    """Times are monotonic seconds, 0 until the moment came."""

    request_id: str
    clock: Clock
    received_s: float
    model: str = UNKNOWN_MODEL
    prepared_s: float = 0.0
    accepted_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    usage: Usage | None = None
    status: int = 0  # set where it differs from the one in the response's head
    error: str = ""  # code

    def prepared(self) -> None:
        self.prepared_s = self.clock.monotonic_s()

    def accepted(self) -> None:
        self.accepted_s = self.clock.monotonic_s()

    def text(self) -> None:
        self.last_s = self.clock.monotonic_s()
        self.first_s = self.first_s or self.last_s

    def server_timing(self) -> str:
        """`prepare`: received → queued; `wait`: queued → accepted by an instance."""
        parts = []
        if self.prepared_s:
            parts.append(f"prepare;dur={(self.prepared_s - self.received_s) * 1000:.2f}")
        if self.accepted_s:
            parts.append(f"wait;dur={(self.accepted_s - self.prepared_s) * 1000:.2f}")
        return ", ".join(parts)

    def close(self, method: str, route: str, status: int, metrics: Metrics) -> None:
        """Count and log the request, once. Reading (GET) is for dashboards, and too frequent for the log."""
        status = self.status or status
        metrics.requests.labels(route, self.model, str(status)).inc()
        counts: dict[str, int | str] = {}
        if self.usage is not None:
            counts = {"prompt_tokens": self.usage.prompt_tokens, "completion_tokens": self.usage.completion_tokens}
            metrics.tokens.labels(self.model, "prompt").inc(self.usage.prompt_tokens)
            metrics.tokens.labels(self.model, "completion").inc(self.usage.completion_tokens)
        if self.first_s:
            metrics.ttft.labels(self.model).observe(self.first_s - self.received_s)
            counts["ttft_ms"] = round((self.first_s - self.received_s) * 1000)
            if self.usage is not None and self.usage.completion_tokens > 1:
                per_token_s = (self.last_s - self.first_s) / (self.usage.completion_tokens - 1)
                metrics.tpot.labels(self.model).observe(per_token_s)
        if self.error:
            counts["error"] = self.error
        say = log.debug if method == "GET" else log.info
        say(
            "request_done",
            request=self.request_id,
            route=route,
            model=self.model,
            status=status,
            duration_ms=round((self.clock.monotonic_s() - self.received_s) * 1000),
            **counts,
        )


EXCHANGE = web.RequestKey("exchange", Exchange)

"""Prometheus metrics of one gateway, in a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stoker_gateway.accuracy import Accuracy

UNKNOWN_MODEL = "unknown"
"""Label of requests that name no registered model: callers must not be able to make up label values."""

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "stoker_gateway_requests", "Requests answered.", ["route", "model", "status"], registry=self._registry
        )
        self.ttft = Histogram(
            "stoker_gateway_ttft_seconds",
            "From a request's arrival to its first text.",
            ["model"],
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self.tpot = Histogram(
            "stoker_gateway_tpot_seconds",
            "Mean time of an answer's tokens after the first.",
            ["model"],
            buckets=_TPOT_BUCKETS_S,
            registry=self._registry,
        )
        self.tokens = Counter(
            "stoker_gateway_tokens", "Tokens of answered requests.", ["model", "kind"], registry=self._registry
        )
        self.cold_starts = Counter(
            "stoker_gateway_cold_starts",
            "Requests that found no ready instance.",
            ["model"],
            registry=self._registry,
        )
        self._queue = Gauge(
            "stoker_gateway_queue_length", "Requests waiting for an instance.", ["model"], registry=self._registry
        )
        self._error = Gauge(
            "stoker_start_prediction_error_ratio",
            "|predicted - actual| / actual of the newest starts, by part (total, load) and quantile.",
            ["part", "quantile"],
            registry=self._registry,
        )
        self._predicted = Gauge(
            "stoker_start_predictions", "Starts that the prediction error is of.", registry=self._registry
        )
        self._open = Gauge("stoker_gateway_open_streams", "Requests in hand.", registry=self._registry)

    def render(self, *, queued: Mapping[str, int], open_streams: int, accuracy: Accuracy) -> bytes:
        """The text exposition. queued: model name → waiting requests."""
        self._error.clear()
        for (part, quantile), error in accuracy.errors.items():
            self._error.labels(part, str(quantile)).set(error)
        self._predicted.set(accuracy.starts)
        self._queue.clear()
        for model, depth in queued.items():
            self._queue.labels(model).set(depth)
        self._open.set(open_streams)
        return generate_latest(self._registry)

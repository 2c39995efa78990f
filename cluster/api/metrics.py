"""Prometheus metrics of the HTTP layer, in a registry that the caller owns. Names follow vLLM's.

What is measured here is what a client sees: from the arrival of the request at this process to the hand-over of a
chunk to the connection. Replicas have metrics of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cluster.api.token_meter import ModelTokens, TokenMeter

_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_E2E_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)


class HttpMetrics:
    """Everything the HTTP layer counts; one per registry.

    Attributes:
        requests: HTTP requests by method, endpoint (the route, not the path) and status; 499 is a client that left.
        in_flight: HTTP requests being answered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "warmgraph_http_requests", "HTTP requests", ["method", "endpoint", "status"], registry=registry
        )
        self.in_flight = Gauge("warmgraph_http_requests_in_flight", "HTTP requests being answered", registry=registry)
        self._ttft = _histogram(registry, "time_to_first_token_seconds", "Arrival to first token", _TTFT_BUCKETS)
        self._e2e = _histogram(registry, "e2e_request_latency_seconds", "Arrival to last token", _E2E_BUCKETS)
        self._prompt = Counter("warmgraph_prompt_tokens", "Prompt tokens", ["model_name"], registry=registry)
        self._tokens = TokenMeter()
        registry.register(self._tokens)
        self._finished = Counter(
            "warmgraph_request_success",
            "Choices that ended, by reason: stop, length, abort (the client left), error",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._held = Gauge(
            "warmgraph_num_requests_held",
            "Requests that wait at this ingress for a place at a replica",
            ["model_name"],
            registry=registry,
        )
        self._models: dict[str, ModelMetrics] = {}

    def for_model(self, name: str) -> ModelMetrics:
        """The metrics of one model. ``name`` must be a served model's, never a client's text."""
        metrics = self._models.get(name)
        if metrics is None:
            metrics = self._models[name] = ModelMetrics(
                time_to_first_token=self._ttft.labels(name),
                e2e_latency=self._e2e.labels(name),
                prompt_tokens=self._prompt.labels(name),
                tokens=self._tokens.for_model(name),
                finished={
                    reason: self._finished.labels(name, reason) for reason in ("stop", "length", "abort", "error")
                },
            )
        return metrics

    def watch_queue(self, name: str, num_held: Callable[[], float]) -> None:
        """Show how many of a model's requests wait here, as ``num_held`` says when asked."""
        self._held.labels(name).set_function(num_held)

    async def export(self) -> tuple[bytes, str]:
        """The registry in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class ModelMetrics:
    """Metrics bound to one model's label, so that the hot path looks nothing up."""

    __slots__ = (
        "e2e_latency",
        "finished",
        "prompt_tokens",
        "time_to_first_token",
        "tokens",
    )

    def __init__(
        self,
        *,
        time_to_first_token: Histogram,
        e2e_latency: Histogram,
        prompt_tokens: Counter,
        tokens: ModelTokens,
        finished: dict[str, Counter],
    ) -> None:
        self.time_to_first_token = time_to_first_token
        self.e2e_latency = e2e_latency
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.finished = finished


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"warmgraph_{name}", text, ["model_name"], buckets=buckets, registry=registry)

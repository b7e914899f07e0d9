"""What Prometheus reads: our names, and vLLM's for what Vertex AI scales on. One registry a server, none global."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server.

    Args:
        gauges: gives name, help and value of what is measured when it is asked for.
    """

    def __init__(self, gauges: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self.registry.register(self)
        # Only names of our own routes and reasons are labels: what clients send must not make series.
        self.requests = Counter("griffin:http_requests", "HTTP requests.", ["route", "status"], registry=self.registry)
        self.refusals = Counter(
            "griffin:admission_rejections", "Requests that were refused.", ["reason"], registry=self.registry
        )
        self.finished = Counter(
            "griffin:request_success", "Choices that ended.", ["finished_reason"], registry=self.registry
        )
        self.prompt_tokens = Counter("griffin:prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.generation_tokens = Counter("griffin:generation_tokens", "Tokens generated.", registry=self.registry)
        self.first_token_s = Histogram(
            "griffin:time_to_first_token_seconds", "Arrival to first token.", buckets=_FIRST_S, registry=self.registry
        )
        self.token_s = Histogram(
            "griffin:inter_token_latency_seconds", "Between tokens.", buckets=_TOKEN_S, registry=self.registry
        )
        self.request_s = Histogram(
            "griffin:e2e_request_latency_seconds", "Arrival to end.", buckets=_FIRST_S, registry=self.registry
        )

    def collect(self) -> Iterator[Any]:
        for name, text, value in self._gauges():
            yield GaugeMetricFamily(name, text, value=value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""Counters of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

from textkv.serve.interface import Outcome

PREFIX = "agentkv"


class Metrics:
    """What happened to requests; all names begin with "agentkv_"."""

    def __init__(self) -> None:
        # Of its own: two servers in one process do not count together.
        self.registry = CollectorRegistry()
        self._requests = Counter(f"{PREFIX}_requests", "Requests by how they ended.", ["ended"], registry=self.registry)
        self._tokens = Counter(f"{PREFIX}_tokens", "Tokens by what was done.", ["done"], registry=self.registry)
        self._seconds = Histogram(
            f"{PREFIX}_answer_seconds",
            "Seconds from a request to the end of its answer.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
            registry=self.registry,
        )

    def answered(self, outcome: Outcome, seconds: float) -> None:
        """An answer is over."""
        self._requests.labels("answered").inc()
        self._tokens.labels("cached").inc(outcome.cached_tokens)
        self._tokens.labels("read").inc(outcome.prompt_tokens - outcome.cached_tokens)
        self._tokens.labels("written").inc(outcome.completion_tokens)
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        """A request got an error."""
        self._requests.labels(f"error {status}").inc()

    def gone(self) -> None:
        """A client left before its answer."""
        self._requests.labels("client left").inc()

    def with_figures(self, figures: dict[str, float]) -> _Together:
        """The counters and what is so at this moment."""
        return _Together(self.registry, figures)


class _Together:
    def __init__(self, registry: CollectorRegistry, figures: dict[str, float]) -> None:
        self._registry, self._figures = registry, figures

    def collect(self) -> Iterator:
        """All families, as a registry gives them."""
        yield from self._registry.collect()
        for name, value in self._figures.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), value=value)

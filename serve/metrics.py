"""Prometheus metrics: the engine's and the store's own counters read at scrape time, and what only the server sees."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 60)


class EngineCollector(Collector):
    """Reads the engine's counters and the store's statistics when asked; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every figure of the engine and the store."""
        counters, store = self.engine.counters, self.engine.store.stats()
        counted = {
            "steps": ("Steps of the engine's loop", counters.steps),
            "requests": ("Requests that produced a first token", counters.requests),
            "prompt_tokens": ("Tokens of these requests' prompts", counters.prompt_tokens),
            "reused_tokens": ("Prompt tokens whose KV was reused", counters.reused_tokens),
            "prefilled_tokens": ("Tokens computed in prefill chunks", counters.prefilled_tokens),
            "generated_tokens": ("Tokens sampled", counters.generated_tokens),
            "preemptions": ("Sequences sent back to the queue for want of pages", counters.preemptions),
            "failed_requests": ("Requests ended by a failed step", counters.failures),
            "pages_evicted": ("Cached pages given up for new ones", store.pages_evicted),
        }
        for name, (text, value) in counted.items():
            yield CounterMetricFamily(f"tokenzero_{name}", text, value=value)
        yield GaugeMetricFamily("tokenzero_running", "Sequences in the batch", value=len(self.engine.running))
        yield GaugeMetricFamily("tokenzero_waiting", "Requests in the queue", value=len(self.engine.waiting))
        pages = GaugeMetricFamily("tokenzero_pages", "Pages of the device pool by state", labels=["state"])
        for state, value in (
            ("free", store.pages_free),
            ("cached", store.pages_cached),
            ("in_use", store.pages_in_use),
        ):
            pages.add_metric([state], value)
        yield pages


class ServerMetrics:
    """What the HTTP side observes, and the registry that holds everything."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.ttft = Histogram(
            "tokenzero_ttft_seconds",
            "From the last byte of the request to the first content_block_delta",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.responses = Counter(
            "tokenzero_responses", "Answers by path and status", ["path", "status"], registry=self.registry
        )
        self.normalized = Counter("tokenzero_normalized", "Texts that a rule changed", ["rule"], registry=self.registry)
        self.unparsed = Counter(
            "tokenzero_unparsed_preambles",
            "System texts that begin like the billing header and do not parse as one",
            registry=self.registry,
        )

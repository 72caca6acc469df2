"""Prometheus metrics: the engine's and the store's own counters read at scrape time, and what only the server sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from serve.audit.auditor import Auditor, auditor_of
from serve.engine.engine import Engine
from serve.engine.restore import Restorer

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 60)
ITL_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2)
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
PHASE_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class EngineCollector(Collector):
    """Reads the engine's counters and the store's statistics when asked; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every figure of the engine and the store."""
        counters, store = self.engine.counters, self.engine.core.memory.prefix_cache.stats()
        counted = {
            "steps": ("Steps of the engine's loop", counters.steps),
            "requests": ("Requests that produced a first token", counters.requests),
            "prompt_tokens": ("Tokens of these requests' prompts", counters.prompt_tokens),
            "reused_tokens": ("Prompt tokens whose KV was reused", counters.reused_tokens),
            "prefilled_tokens": ("Tokens computed in prefill chunks", counters.prefilled_tokens),
            "generated_tokens": ("Tokens sampled", counters.generated_tokens),
            "spec_decode_draft_tokens": ("Draft tokens that were verified", counters.draft_tokens),
            "spec_decode_accepted_tokens": ("Of these, the ones that were accepted", counters.accepted_tokens),
            "preemptions": ("Sequences sent back to the queue for want of pages", counters.preemptions),
            "failed_requests": ("Requests ended by a failed step or constraint", counters.failures),
            "pages_evicted": ("Cached pages given up for new ones", store.pages_evicted),
        }
        for name, (text, value) in counted.items():
            yield CounterMetricFamily(f"tokenzero_{name}", text, value=value)
        yield GaugeMetricFamily(
            "tokenzero_num_requests_running", "Sequences in the batch", value=len(self.engine.running)
        )
        yield GaugeMetricFamily(
            "tokenzero_num_requests_waiting", "Requests in the queue", value=len(self.engine.waiting)
        )
        pages = GaugeMetricFamily("tokenzero_pages", "Pages of the device pool by state", labels=["state"])
        for state, value in (
            ("free", store.pages_free),
            ("cached", store.pages_cached),
            ("in_use", store.pages_in_use),
        ):
            pages.add_metric([state], value)
        auditor = auditor_of(self.engine)
        if auditor:
            pages.add_metric(["auditor"], self.engine.settings.audit_pages)
        yield pages
        if auditor:
            yield from audit_metrics(auditor)
        if self.engine.core.restorer:
            yield from tier_metrics(self.engine.core.restorer)


def audit_metrics(auditor: Auditor) -> Iterator[Metric]:
    """What was audited of what requests reused, and what was found wrong."""
    for name, text, value in (
        ("audited_requests", "Requests whose reused prefix was computed again", auditor.requests),
        ("audited_tokens", "Reused tokens that were computed again", auditor.tokens),
        ("audit_mismatches", "Audits that found cached pages wrong: they were dropped", auditor.mismatches),
        ("audit_seconds", "What audits took the device", auditor.seconds),
        ("audit_failures", "Audits that ended by an error of their own", auditor.failures),
    ):
        yield CounterMetricFamily(f"tokenzero_{name}", text, value=value)


def tier_metrics(restorer: Restorer) -> Iterator[Metric]:
    """What the tiers below the device hold and did, and what the engine took from them."""
    stats = restorer.tiers.pages.stats()
    for family, name, text in (
        (GaugeMetricFamily, "pages", "Pages in a tier"),
        (GaugeMetricFamily, "bytes", "Bytes that a tier occupies"),
        (GaugeMetricFamily, "open", "Whether a tier can be used now"),
        (CounterMetricFamily, "hits", "Pages found on reading"),
        (CounterMetricFamily, "misses", "Pages not found on reading"),
        (CounterMetricFamily, "bytes_read", "Payload read"),
        (CounterMetricFamily, "bytes_written", "Payload written"),
        (CounterMetricFamily, "evicted", "Pages evicted to stay in the budget"),
        (CounterMetricFamily, "corrupt", "Pages removed because their checksum was wrong"),
        (CounterMetricFamily, "dropped", "Pages that could not be written"),
        (CounterMetricFamily, "errors", "Failed operations of the disk or the network"),
    ):
        metric = family(f"tokenzero_tier_{name}", text, labels=["tier"])
        for tier in stats:
            metric.add_metric([tier.name], getattr(tier, name))
        yield metric
    restored = CounterMetricFamily("tokenzero_restored_tokens", "Tokens copied in from a tier", labels=["tier"])
    latency = SummaryMetricFamily("tokenzero_restore_seconds", "Reading one slice of pages", labels=["tier"])
    for tier in stats:
        restored.add_metric([tier.name], restorer.restored_tokens[tier.name])
        latency.add_metric([tier.name], restorer.reads[tier.name], restorer.read_seconds[tier.name])
    yield restored
    yield latency
    writer = restorer.tiers.writer
    yield CounterMetricFamily(
        "tokenzero_write_dropped_pages",
        "Pages that the writer was too slow for, or that could not be copied",
        value=writer.dropped,
    )
    yield CounterMetricFamily(
        "tokenzero_recomputed_pages",
        "Stored pages that were sooner computed than read",
        value=restorer.recomputed_pages,
    )
    yield CounterMetricFamily(
        "tokenzero_failed_pages", "Pages that could not be loaded, or that a tier failed on", value=writer.failed
    )
    yield CounterMetricFamily(
        "tokenzero_tier_exceptions",
        "Exceptions that tiers raised",
        value=writer.failures.count + restorer.tiers.pages.failures.count,
    )
    yield GaugeMetricFamily("tokenzero_write_queue_bytes", "Payload waiting to be written", value=writer.queued_bytes)
    yield GaugeMetricFamily(
        "tokenzero_restore_queue_bytes", "Payload being read back or waiting to be used", value=restorer.staged_bytes
    )


@dataclass(frozen=True)
class Memory:
    """What the server remembers of one kind, and how much of it at most."""

    bytes: Callable[[], int]
    most: int


class MemoryCollector(Collector):
    """Reads how many bytes each memory takes when asked."""

    def __init__(self, memories: Mapping[str, Memory]) -> None:
        self.memories = memories

    def collect(self) -> Iterator[Metric]:
        """The bytes taken, and the most that may be."""
        figures: tuple[tuple[str, str, Callable[[Memory], int]], ...] = (
            ("tokenzero_memory_bytes", "Memory taken by what is remembered of requests, about", lambda m: m.bytes()),
            ("tokenzero_memory_limit_bytes", "The most that it may take", lambda m: m.most),
        )
        for name, text, value in figures:
            family = GaugeMetricFamily(name, text, labels=["of"])
            for of, memory in self.memories.items():
                family.add_metric([of], value(memory))
            yield family


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
        self.itl = Histogram(
            "tokenzero_itl_seconds",
            "Between two tokens of an answer, as the server hands them on",
            buckets=ITL_SECONDS,
            registry=self.registry,
        )
        self.phases = Histogram(
            "tokenzero_phase_seconds",
            "What each phase of a request took, counted when its answer ends",
            ["phase"],
            buckets=PHASE_SECONDS,
            registry=self.registry,
        )
        self.lag = Histogram(
            "tokenzero_loop_lag_seconds",
            "By how much the event loop was late for a task that wants to run every 10 ms",
            buckets=LAG_SECONDS,
            registry=self.registry,
        )
        self.responses = Counter(
            "tokenzero_http_responses", "Answers by path and status", ["path", "status"], registry=self.registry
        )
        self.normalized = Counter(
            "tokenzero_rule_applications", "Texts that a rule changed", ["rule"], registry=self.registry
        )
        self.saved_tokens = Counter(
            "tokenzero_rule_saved_tokens", "Tokens reused thanks to this rule alone", ["rule"], registry=self.registry
        )
        self.saved_seconds = Counter(
            "tokenzero_rule_saved_seconds",
            "What computing these tokens would have taken, by the cost model",
            ["rule"],
            registry=self.registry,
        )
        self.divergences = Counter(
            "tokenzero_cache_misses",
            "Requests that reused less than the nearest sequence held, or had none, by cause",
            ["cause"],
            registry=self.registry,
        )
        self.lost = Counter(
            "tokenzero_cache_miss_tokens",
            "Tokens computed that the nearest sequence held behind the mismatch, by cause",
            ["cause"],
            registry=self.registry,
        )
        self.volatile = Counter(
            "tokenzero_volatile_segments",
            "Parts of prompts found to change in every request of a client",
            registry=self.registry,
        )
        self.lost_turns = Counter(
            "tokenzero_write_dropped_answers", "Sampled turns that the disk was too slow for", registry=self.registry
        )
        self.unparsed = Counter(
            "tokenzero_unparsed_preambles",
            "System texts that begin like the billing header and do not parse as one",
            registry=self.registry,
        )

    def count_phases(self, seconds: Mapping[str, float]) -> None:
        """Count what each phase of a request took."""
        for phase, taken in seconds.items():
            self.phases.labels(phase).observe(taken)

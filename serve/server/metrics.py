"""Prometheus metrics: figures that the engine, its tiers and its auditor keep, and what the server observes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from cache.tier import TierStats
from serve.audit.auditor import Auditor, auditor_of
from serve.engine.engine import Engine
from serve.engine.preload import Preloader
from serve.engine.restore import Restorer

S = TypeVar("S")
PREFIX = "tokenzero_"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 60)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1, 2, 5)
ITL_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2)
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
PHASE_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

COUNTER, GAUGE, SUMMARY = CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
KINDS = {COUNTER: "counter", GAUGE: "gauge", SUMMARY: "summary", Counter: "counter", Histogram: "histogram"}


@dataclass(frozen=True)
class Figure(Generic[S]):
    """A metric that is read from its source at each scrape.

    `read` returns its number, or with a `label` its numbers by the label's value; of a summary (count, sum).
    """

    name: str  # without the prefix, and without the suffix `_total` of counters
    kind: type
    text: str
    read: Callable[[S], Any]
    label: str = ""


ENGINE: tuple[Figure[Engine], ...] = (
    Figure("steps", COUNTER, "Steps of the engine's loop", lambda engine: engine.counters.steps),
    Figure("requests", COUNTER, "Requests that got a first token", lambda engine: engine.counters.requests),
    Figure("prompt_tokens", COUNTER, "Tokens of their prompts", lambda engine: engine.counters.prompt_tokens),
    Figure("reused_tokens", COUNTER, "Prompt tokens whose KV was reused", lambda engine: engine.counters.reused_tokens),
    Figure("prefilled_tokens", COUNTER, "Tokens computed by prefill", lambda engine: engine.counters.prefilled_tokens),
    Figure("generated_tokens", COUNTER, "Tokens sampled", lambda engine: engine.counters.generated_tokens),
    Figure("spec_decode_draft_tokens", COUNTER, "Draft tokens verified", lambda engine: engine.counters.draft_tokens),
    Figure(
        "spec_decode_accepted_tokens", COUNTER, "Draft tokens accepted", lambda engine: engine.counters.accepted_tokens
    ),
    Figure(
        "preemptions",
        COUNTER,
        "Sequences sent back to the queue, as pages ran out or a key had fewer places",
        lambda engine: engine.counters.preemptions,
    ),
    Figure(
        "failed_requests",
        COUNTER,
        "Requests that a failed step or constraint ended",
        lambda engine: engine.counters.failures,
    ),
    Figure(
        "pages_evicted",
        COUNTER,
        "Cached pages evicted for new ones",
        lambda engine: engine.core.memory.prefix_cache.tree.evicted_pages,
    ),
    Figure("num_requests_running", GAUGE, "Sequences in the batch", lambda engine: len(engine.running)),
    Figure("num_requests_waiting", GAUGE, "Requests in the queue", lambda engine: len(engine.waiting)),
    Figure(
        "tensor_parallel_devices",
        GAUGE,
        "Devices over which the model is divided",
        lambda engine: engine.settings.tensor_parallel,
    ),
    Figure(
        "pages",
        GAUGE,
        "Pages of the device pool by state: free, cached, retained (no request uses them), in_use, auditor",
        lambda engine: pages_by_state(engine),
        "state",
    ),
    Figure(
        "retentions",
        COUNTER,
        "Requests to keep a prefix by what became of them: retained, pinned, refused, expired, lost (for want of room)",
        lambda engine: dict(engine.core.retainer.retentions.events),
        "event",
    ),
    Figure(
        "programs",
        GAUGE,
        "The engine's programs, one or more for each batch shape, by state: pending, compiling, ready, failed",
        lambda engine: engine.core.programs.by_state(),
        "state",
    ),
    Figure(
        "programs_loaded",
        COUNTER,
        "Programs whose executable was read from disk",
        lambda engine: engine.core.programs.loaded,
    ),
    Figure("programs_compiled", COUNTER, "Programs compiled anew", lambda engine: engine.core.programs.compiled),
    Figure(
        "compile_seconds",
        COUNTER,
        "Time to trace, lower and compile programs",
        lambda engine: engine.core.programs.compile_seconds,
    ),
)

AUDITOR: tuple[Figure[Auditor], ...] = (
    Figure("audited_requests", COUNTER, "Requests whose prefix was recomputed", lambda auditor: auditor.requests),
    Figure("audited_tokens", COUNTER, "Reused tokens that were recomputed", lambda auditor: auditor.tokens),
    Figure(
        "audit_mismatches",
        COUNTER,
        "Audits that found wrong pages in the cache, and dropped them",
        lambda auditor: auditor.mismatches,
    ),
    Figure("audit_seconds", COUNTER, "Device time that audits took", lambda auditor: auditor.seconds),
    Figure("audit_failures", COUNTER, "Audits that ended with an error", lambda auditor: auditor.failures),
)


def by_tier(read: Callable[[TierStats], float]) -> Callable[[Sequence[TierStats]], dict[str, float]]:
    """A reader of one statistic of every tier."""
    return lambda stats: {tier.name: read(tier) for tier in stats}


TIERS: tuple[Figure[Sequence[TierStats]], ...] = (
    Figure("tier_pages", GAUGE, "Pages in a tier", by_tier(lambda tier: tier.pages), "tier"),
    Figure("tier_bytes", GAUGE, "Bytes that a tier occupies", by_tier(lambda tier: tier.bytes), "tier"),
    Figure("tier_open", GAUGE, "1 if a tier can be used now, 0 if not", by_tier(lambda tier: tier.open), "tier"),
    Figure("tier_hits", COUNTER, "Reads that found their page", by_tier(lambda tier: tier.hits), "tier"),
    Figure("tier_misses", COUNTER, "Reads that did not", by_tier(lambda tier: tier.misses), "tier"),
    Figure("tier_bytes_read", COUNTER, "Payload read", by_tier(lambda tier: tier.bytes_read), "tier"),
    Figure("tier_bytes_written", COUNTER, "Payload written", by_tier(lambda tier: tier.bytes_written), "tier"),
    Figure("tier_evicted", COUNTER, "Pages evicted to stay in the budget", by_tier(lambda tier: tier.evicted), "tier"),
    Figure("tier_corrupt", COUNTER, "Pages removed for a wrong checksum", by_tier(lambda tier: tier.corrupt), "tier"),
    Figure("tier_dropped", COUNTER, "Pages that could not be written", by_tier(lambda tier: tier.dropped), "tier"),
    Figure("tier_errors", COUNTER, "Failed disk or network operations", by_tier(lambda tier: tier.errors), "tier"),
)

RESTORER: tuple[Figure[Restorer], ...] = (
    Figure(
        "restored_tokens",
        COUNTER,
        "Tokens copied to the device from a tier",
        lambda restorer: {tier: restorer.restored_tokens[tier] for tier in tier_names(restorer)},
        "tier",
    ),
    Figure(
        "restore_seconds",
        SUMMARY,
        "Time to read one slice of pages",
        lambda restorer: {tier: (restorer.reads[tier], restorer.read_seconds[tier]) for tier in tier_names(restorer)},
        "tier",
    ),
    Figure(
        "write_dropped_pages",
        COUNTER,
        "Pages not written because the writer was too slow or the copy failed",
        lambda restorer: restorer.tiers.writer.dropped,
    ),
    Figure(
        "recomputed_pages",
        COUNTER,
        "Stored pages computed again because that was faster than reading",
        lambda restorer: restorer.recomputed_pages,
    ),
    Figure(
        "failed_pages",
        COUNTER,
        "Pages that could not be loaded, or that a tier failed on",
        lambda restorer: restorer.tiers.writer.failed,
    ),
    Figure(
        "tier_exceptions",
        COUNTER,
        "Exceptions that tiers raised",
        lambda restorer: restorer.tiers.writer.failures.count + restorer.tiers.pages.failures.count,
    ),
    Figure(
        "write_queue_bytes",
        GAUGE,
        "Payload that waits to be written",
        lambda restorer: restorer.tiers.writer.queued_bytes,
    ),
    Figure(
        "restore_queue_bytes",
        GAUGE,
        "Payload that is being read back or waits to be used",
        lambda restorer: restorer.staged_bytes,
    ),
)

PRELOADER: tuple[Figure[Preloader], ...] = (
    Figure(
        "preloaded_pages",
        GAUGE,
        "Pages of a tier in the device pool that no request has asked for yet",
        lambda preloader: len(preloader.preloaded),
    ),
    Figure(
        "preload_pages",
        COUNTER,
        "Pages preloaded, and what became of them: read, taken (over by a request), evicted",
        lambda preloader: {
            "read": preloader.preloaded.read,
            "taken": preloader.preloaded.taken,
            "evicted": preloader.preloaded.evicted,
        },
        "event",
    ),
)


@dataclass(frozen=True)
class Memory:
    """One kind of memory that the server keeps of requests, and its limit in bytes."""

    bytes: Callable[[], int]
    most: int


MEMORIES: tuple[Figure[Mapping[str, Memory]], ...] = (
    Figure(
        "memory_bytes",
        GAUGE,
        "Memory in use, about, by what is remembered",
        lambda memories: {name: memory.bytes() for name, memory in memories.items()},
        "of",
    ),
    Figure(
        "memory_limit_bytes",
        GAUGE,
        "Its limit",
        lambda memories: {name: memory.most for name, memory in memories.items()},
        "of",
    ),
)


def pages_by_state(engine: Engine) -> dict[str, int]:
    """The pages of the device pool by state."""
    states = engine.core.retainer.pages_by_state()
    return states | ({"auditor": engine.settings.audit_pages} if auditor_of(engine) else {})


def tier_names(restorer: Restorer) -> list[str]:
    """The names of the tiers below the device, the fastest first."""
    return [tier.name for tier in restorer.tiers.pages.tiers]


def read_figures(figures: Iterable[Figure[S]], source: S) -> Iterator[Metric]:
    """The metrics with their present values."""
    for figure in figures:
        metric = figure.kind(PREFIX + figure.name, figure.text, labels=[figure.label] if figure.label else [])
        values = figure.read(source)
        for label, value in values.items() if figure.label else [("", values)]:
            numbers = value if isinstance(value, tuple) else (value,)
            metric.add_metric([label] if figure.label else [], *numbers)
        yield metric


class EngineCollector(Collector):
    """Reads the figures of the engine, of its auditor and of its tiers at each scrape; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every figure of what the engine has."""
        yield from read_figures(ENGINE, self.engine)
        if auditor := auditor_of(self.engine):
            yield from read_figures(AUDITOR, auditor)
        if restorer := self.engine.core.restorer:
            yield from read_figures(TIERS, restorer.tiers.pages.stats())
            yield from read_figures(RESTORER, restorer)
        if preloader := self.engine.core.preloader:
            yield from read_figures(PRELOADER, preloader)


class MemoryCollector(Collector):
    """Reads the bytes of each memory at each scrape."""

    def __init__(self, memories: Mapping[str, Memory]) -> None:
        self.memories = memories

    def collect(self) -> Iterator[Metric]:
        """The bytes in use, and their limits."""
        yield from read_figures(MEMORIES, self.memories)


@dataclass(frozen=True)
class Documented:
    """What the documentation says of a metric."""

    name: str  # as `/metrics` has it
    kind: str
    labels: tuple[str, ...]
    text: str


class ServerMetrics:
    """What the server observes, and the registry of all metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.documented: list[Documented] = []
        self.ttft = self.histogram("ttft_seconds", "Last byte of a request to its first content_block_delta", SECONDS)
        self.forecast_error = self.histogram(
            "forecast_error",
            "Difference of the predicted from the measured TTFT, as a share of the measured one",
            SHARES,
        )
        self.itl = self.histogram("itl_seconds", "Time between two tokens of an answer", ITL_SECONDS)
        self.phases = self.histogram(
            "phase_seconds", "Time of each phase of a request, counted when its answer ends", PHASE_SECONDS, "phase"
        )
        self.lag = self.histogram(
            "loop_lag_seconds", "Delay of a task on the event loop that is due every 10 ms", LAG_SECONDS
        )
        self.responses = self.counter("http_responses", "Responses by path and status", "path", "status")
        self.rule_applications = self.counter("rule_applications", "Texts that a rule changed", "rule")
        self.saved_tokens = self.counter("rule_saved_tokens", "Tokens reused because of this rule alone", "rule")
        self.saved_seconds = self.counter(
            "rule_saved_seconds", "Time to compute these tokens, by the cost model", "rule"
        )
        self.cache_misses = self.counter(
            "cache_misses", "Requests that reused less than the nearest sequence held, by cause", "cause"
        )
        self.cache_miss_tokens = self.counter(
            "cache_miss_tokens", "Computed tokens that the nearest sequence held after the mismatch, by cause", "cause"
        )
        self.unenforced_keywords = self.counter(
            "unenforced_schema_keywords", "Keywords left out of a schema, counted when it is first enforced", "keyword"
        )
        self.volatile = self.counter("volatile_segments", "Parts of prompts that change in every request of a client")
        self.dropped_answers = self.counter(
            "write_dropped_answers", "Recorded answers not written because the disk was too slow"
        )
        self.refused = self.counter(
            "refused_requests", "Requests and connections beyond a limit, by the name of its flag", "limit"
        )
        self.wrong_keys = self.counter("wrong_keys", "Requests with a wrong API key")
        self.unparsed = self.counter(
            "unparsed_preambles", "System texts that start like the billing header but do not parse as one"
        )
        self.unread = self.counter("unread_blocks", "Blocks that the model reads as a short text, by type", "type")
        self.left_out_tools = self.counter(
            "left_out_tools", "Tools not offered since only their vendor can run them, by type", "type"
        )

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """Make, register and document a histogram."""
        self.documented.append(Documented(PREFIX + name, KINDS[Histogram], labels, text))
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Make, register and document a counter."""
        self.documented.append(Documented(f"{PREFIX}{name}_total", KINDS[Counter], labels, text))
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def count_refused(self, limit: str) -> None:
        """Count a request or a connection beyond a limit."""
        self.refused.labels(limit).inc()

    def count_phases(self, seconds: Mapping[str, float]) -> None:
        """Count the time of each phase of a request."""
        for phase, taken in seconds.items():
            self.phases.labels(phase).observe(taken)


def documented_metrics() -> list[Documented]:
    """Every metric that `/metrics` can have, in its order."""
    tables: tuple[tuple[Figure[Any], ...], ...] = (ENGINE, AUDITOR, TIERS, RESTORER, PRELOADER, MEMORIES)
    return [*ServerMetrics().documented, *documented(chain.from_iterable(tables))]


def documented(figures: Iterable[Figure[Any]]) -> list[Documented]:
    """What the documentation says of these figures."""
    return [
        Documented(
            f"{PREFIX}{figure.name}{'_total' if figure.kind is COUNTER else ''}",
            KINDS[figure.kind],
            (figure.label,) if figure.label else (),
            figure.text,
        )
        for figure in figures
    ]

"""All replicas' metrics as those of one engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.cluster.client import ClusterEngine

# Of a tier that replicas share, each reports all of it. A process's own memory is not shared.
SHARED = ("tokenzero_tier_pages", "tokenzero_tier_bytes", "tokenzero_tier_open")


class ClusterCollector(Collector):
    """Asks every replica for its figures at each scrape."""

    def __init__(self, engine: ClusterEngine) -> None:
        self.engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: without it, registering would ask the replicas."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The sum over the replicas, and each replica's own requests."""
        yield from total(self.engine.ask_from_thread("metrics"))
        running = GaugeMetricFamily("tokenzero_replica_requests", "Requests of a replica", labels=["replica", "state"])
        for name, report in self.engine.reports.items():
            running.add_metric([name, "running"], report.running)
            running.add_metric([name, "waiting"], report.waiting)
        yield running


def total(pages: Iterable[Iterable[Metric]]) -> Iterator[Metric]:
    """One page of metrics for several: sums, and the largest value of what all of them share."""
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for metric in (metric for page in pages for metric in page):
        found.setdefault(metric.name, metric)
        summed = values.setdefault(metric.name, {})
        for sample in metric.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            before = summed.get(key, 0.0)
            shared = metric.name in SHARED and sample.labels.get("tier") != "host"
            summed[key] = max(before, sample.value) if shared else before + sample.value
    for name, metric in found.items():
        one = Metric(name, metric.documentation, metric.type)
        for (sample_name, labels), value in values[name].items():
            one.add_sample(sample_name, dict(labels), value)
        yield one

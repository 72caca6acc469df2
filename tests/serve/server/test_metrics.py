"""What is exported, what is documented, and what the dashboard for Grafana asks for are the same metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import serve
from serve.docs import metric_table
from serve.server.key_metrics import KEYS, KeyCollector
from serve.server.metrics import Documented, documented, documented_metrics
from serve.web.keys import Key, Keys

DASHBOARD = json.loads(Path(serve.__file__).with_name("deploy").joinpath("grafana.json").read_text())
SERIES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
# Labels that Prometheus adds, and that buckets have.
ADDED = {"instance", "le"}


def series() -> dict[str, Documented]:
    """Every name that can be asked for, with its metric."""
    metrics = [*documented_metrics(), *documented(KEYS)]
    return {metric.name + end: metric for metric in metrics for end in SERIES.get(metric.kind, ("",))}


def queries() -> list[str]:
    """Every query of the dashboard."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [*targets, *(each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query")]


def test_every_query_of_the_dashboard_asks_for_metrics_that_are_exported() -> None:
    known = series()
    for query in queries():
        names = re.findall(r"\btokenzero_\w+", query)
        assert names, query
        assert set(names) <= known.keys(), query
        labels = set(re.findall(r'(\w+)=~?"', query)) | set(re.findall(r"by \((\w+)\)", query))
        assert labels <= ADDED.union(*(known[name].labels for name in names)), query


def test_panels_have_numbers_and_places_of_their_own_and_legends_of_their_labels() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    for panel in panels:
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown == set(re.findall(r"by \((\w+)\)", target["expr"])) - {"le"}


def test_the_metrics_of_keys_are_documented() -> None:
    exported = {metric.name for metric in KeyCollector(Keys([Key("alice", bytes(32))])).collect()}
    assert exported == {metric.name.removesuffix("_total") for metric in documented(KEYS)}


def test_each_metric_is_a_row_of_the_table_once() -> None:
    table, metrics = metric_table(), [*documented_metrics(), *documented(KEYS)]
    assert all(table.count(f"| `{metric.name}` | {metric.kind} |") == 1 for metric in metrics)

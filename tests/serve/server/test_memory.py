"""The server's memory is bounded, and its metrics are documented: the README, the code and `/metrics` say the same."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

import serve
from experiments.harness.server import Server
from serve.rules.log import warn_once
from serve.rules.normalize import Unparsed
from serve.server.config import parser
from serve.server.metrics import documented_metrics
from tests.helpers.http import ask, post

README = Path(serve.__file__).with_name("README.md")
ROW = re.compile(r"^\| `([^`]+)` \| [^|]+ \| ([\d.]+) MiB \| (?:`(--[a-z-]+)`)?[^|]*\|$", re.MULTILINE)


def by_name(page: str, metric: str) -> dict[str, float]:
    """The values of a metric with the label `of`."""
    return {name: float(value) for name, value in re.findall(rf'^{metric}{{of="([^"]+)"}} (\S+)$', page, re.MULTILINE)}


def test_the_table_of_the_readme_is_what_the_server_says(server: Server, client: httpx.Client) -> None:
    rows = ROW.findall(README.read_text())
    post(client, ask("Remember this."))
    page = client.get("/metrics").text
    limits, taken = (by_name(page, f"tokenzero_memory_{kind}") for kind in ("limit_bytes", "bytes"))
    assert {name: round(limit / 2**20, 2) for name, limit in limits.items()} == {
        name: float(most) for name, most, _ in rows
    }
    assert limits.keys() == taken.keys()
    assert all(taken[name] <= limits[name] for name in taken)
    assert {name for name, value in taken.items() if value} >= {"segments", "answers", "reports", "statuses"}
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert {flag for *_, flag in rows if flag} <= flags


def test_every_metric_is_documented_with_its_type(client: httpx.Client) -> None:
    page = client.get("/metrics").text
    served = set(re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE))
    documented = {(metric.name, metric.kind) for metric in documented_metrics()}
    assert {(name, kind) for name, kind in served if not name.endswith("_created")} <= documented
    assert len(documented) == len(documented_metrics())


def test_the_shapes_that_were_logged_are_bounded() -> None:
    reported: set[str] = set()
    for number in range(2000):
        warn_once(Unparsed("strip-preamble", "system", f"x-anthropic-billing-header {number} " + "x" * 500), reported)
    assert len(reported) == 1000
    assert max(map(len, reported)) <= 80

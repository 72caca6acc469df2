"""The benchmark of the loop's lag: which bucket is a case's figure, and that a case is counted on a real server."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from experiments.bench.loop_lag import MIB, ask, cases, highest, measured, posted
from experiments.harness.server import running_server
from experiments.workloads.demo_model import TINY, write_demo_model


def test_the_figure_is_the_bound_that_no_beat_exceeded() -> None:
    before = {0.01: 5.0, 0.05: 7.0, inf: 7.0}
    assert highest(before, {0.01: 8.0, 0.05: 10.0, inf: 10.0}) == (3, 0.01)
    assert highest(before, {0.01: 8.0, 0.05: 11.0, inf: 11.0}) == (4, 0.05)
    assert highest(before, {0.01: 8.0, 0.05: 10.0, inf: 11.0}) == (4, inf)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [name for name, _ in cases()]
    assert len(set(names)) == len(names)
    assert "650,000 tools" in names


@pytest.mark.slow
def test_a_case_is_counted_on_a_real_server(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", config=TINY)
    with running_server(tmp_path / "model", "--kv-pool-bytes", "16MiB", "--max-num-seqs", "2") as server:
        row = measured(server.url, "a long word", posted(ask("a" * MIB)))
    assert row.statuses == [400]
    assert row.beats > 0

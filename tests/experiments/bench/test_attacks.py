"""The benchmark of attacks: every attack can be named, and a crowd costs well-behaved clients nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from experiments.bench.attacks import attacks, crowd, delay, keys
from experiments.harness.server import running_server
from experiments.workloads.demo_model import TINY, write_demo_model


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [name for name, _ in attacks()]
    assert len(set(names)) == len(names)
    assert {"none", "650,000 tools", "a header of 64 MiB"} <= set(names)


@pytest.mark.slow
def test_many_connections_at_once_break_no_stream_and_leave_nothing_behind(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", config=TINY)
    with running_server(tmp_path / "model", "--kv-pool-bytes", "64MiB", *keys(tmp_path)) as server:
        found = crowd(server)
        row = delay(server.url, "a header of 64 MiB", 1.0, 0.0, random.Random(0))
    assert (found.whole, found.broken) == (300, 0)
    assert found.files[1] <= found.files[0] + 8
    # The pool's threads stay: anyio has 40, besides those of a key and of large bodies, 4 each.
    assert found.threads[1] <= found.threads[0] + 48
    assert row.statuses in ([431], [])
    assert row.rounds > 0

"""The host path's benchmark counts what it should: tokens, the cached prefix, and every phase."""

from __future__ import annotations

from pathlib import Path

from experiments.bench.host_path import PHASES, measure, row
from experiments.workloads.demo_model import TINY, write_demo_model
from serve.prompt.tokenizer import load_tokenizer


def test_a_warm_request_reads_all_but_its_question(tmp_path: Path) -> None:
    write_demo_model(tmp_path, config=TINY)
    cold, warm = measure(lambda: load_tokenizer(str(tmp_path)), tokens=40_000, repeats=3)
    assert cold.cached == 0
    for timed in warm:
        assert timed.tokens > 20_000
        assert 0 < timed.tokens - timed.cached < 2_000
        assert set(timed.phases) == set(PHASES)
    assert row(cold, warm)["warm_ms"] > 0

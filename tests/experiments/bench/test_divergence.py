"""The benchmark of reports: that it measures what its rows say."""

from __future__ import annotations

from pathlib import Path

from experiments.bench.divergence import cases, measure
from experiments.workloads.demo_model import TINY, write_demo_model
from serve.prompt.tokenizer import load_tokenizer


def test_each_row_is_a_report_on_its_cause(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", config=TINY)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for name, bodies in cases(6000, tokenizer).items():
        cause, tokens, reports, looks = measure(bodies, tokenizer, repeats=2)
        assert cause == name
        assert 5500 < tokens < 7000
        assert len(reports) == len(looks) == 2
        assert min(reports + looks) > 0

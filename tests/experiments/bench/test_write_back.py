"""What the write-back benchmark makes of its answers."""

from __future__ import annotations

from experiments.bench.write_back import Answered, summarise


def test_ratios_are_taken_within_a_round_so_that_a_slow_round_weighs_no_more() -> None:
    without = [Answered(100, (10.0, 10.0)), Answered(1000, (50.0, 50.0)), Answered(100, (10.0, 12.0))]
    stored = [Answered(110, (10.0, 11.0)), Answered(1100, (60.0, 50.0)), Answered(90, (11.0, 11.0))]
    summary = summarise({"without": without, "with": stored})
    assert summary["ratios"] == {"first_token": 1.1, "between_tokens": 1.05}
    assert summary["arms"]["with"]["first_token_ms"] == 110
    assert summary["arms"]["without"]["between_tokens_ms"] == 11

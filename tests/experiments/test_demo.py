"""The demo's account of a run: its figures, the bound of the restarted arm, and what it says of them."""

from __future__ import annotations

import pytest

from experiments.demo import ARMS, READING_SHARE, Reading, prompts_of, summarise, table, verdict
from experiments.harness.client import Timing


def timings(*ttft_ms: float) -> list[Timing]:
    return [Timing(ms, ms + 50, 52_000, 51_700, 8, "text") for ms in ttft_ms]


def summary_of(restarted_ms: float) -> dict:
    """A run with 200 ms warm, and 120 MB to read from a disk of 2 GB/s."""
    arms = {
        "stable": timings(30_000, 190, 200, 210),
        "varying": timings(30_000, 16_000),
        "stripped": timings(30_000, 204),
        "restarted": timings(30_000, restarted_ms),
    }
    return summarise(arms, Reading(120_000_000, 2e9), 2**30) | {"dtype": "float32"}


def test_the_first_request_of_an_arm_is_its_cold_one_and_counts_in_no_median() -> None:
    summary = summary_of(290)
    assert summary["arms"]["stable"]["cold_ms"] == 30_000
    assert summary["arms"]["stable"]["median_ms"] == 200
    assert summary["ratios"]["varying_over_stable"] == 80


@pytest.mark.parametrize(("restarted_ms", "word"), [(299, "kept"), (301, "missed")])
def test_a_restart_may_cost_a_warm_request_and_reading_at_a_share_of_the_disks_rate(
    restarted_ms: float, word: str
) -> None:
    summary = summary_of(restarted_ms)
    assert READING_SHARE == 0.6
    assert summary["restarted"] == {"bytes_read": 120_000_000, "disk_mb_per_s": 2000, "bound_ms": 300.0}
    assert verdict(summary) == (
        f"restarted: {restarted_ms} ms, bound 300 ms ({word}): 200 ms warm and 120 MB at 60% of the disk's 2,000 MB/s"
    )


def test_the_table_has_a_row_for_every_arm() -> None:
    assert table(summary_of(290)).row_count == 4


def test_a_length_that_no_prompt_has_ends_it_with_a_sentence() -> None:
    with pytest.raises(SystemExit) as ended:
        prompts_of(ARMS, 500, 0, lambda request: len(str(request)) // 4)
    assert str(ended.value).startswith(
        "demo: --tokens: expected a length that an agent's prompt can have, such as 8000"
    )
    assert "got 500: no prompt of 500 tokens" in str(ended.value)

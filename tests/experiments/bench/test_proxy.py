"""The benchmark of the proxy: that its engine waits and streams as its rows say, and what is taken from what."""

from __future__ import annotations

from experiments.bench.proxy import WORD_SECONDS, WORDS, process, row, take_turns
from experiments.harness.client import Timing


def test_the_engine_waits_and_streams_a_word_at_a_time() -> None:
    stable = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
    with process("uvicorn", "experiments.bench.proxy:engine", "--log-level", "error") as url:
        times = take_turns({"direct": url, "again": url}, stable, 50, repeats=2)
    for taken in (*times["direct"], *times["again"]):
        assert taken.text == "word " * WORDS
        assert taken.ttft_ms > 45
        assert taken.total_ms - taken.ttft_ms > 1e3 * WORD_SECONDS * (WORDS - 1)


def test_a_row_reports_by_how_much_the_median_exceeds_the_direct_ways() -> None:
    def timed(*ttft_ms: float) -> list[Timing]:
        return [
            Timing(ttft_ms=ms, total_ms=10 * ms, prompt_tokens=1, cached_tokens=0, output_tokens=1, text="")
            for ms in ttft_ms
        ]

    made = row("proxy", 20, {"direct": timed(1, 2, 9), "proxy": timed(3, 4, 4)})
    assert (made["ttft_ms"], made["added_ttft_ms"], made["added_total_ms"]) == (4, 2, 20)

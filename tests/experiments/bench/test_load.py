"""The load of agent sessions: what is planned, what a stream's events tell, and a run against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.bench.load import Config, draw, is_good, main, plans, summarise, sustained
from experiments.bench.open_loop import Asked, Plan, ask, offer
from experiments.harness.server import free_port, running_server
from experiments.workloads.demo_model import TINY, write_demo_model

SMALL = Config(seconds=40, ramp=0, scale=0.02, turns=2)
FLAGS = ("--max-model-len", "24576", "--kv-pool-bytes", "64MiB", "--max-prefill-tokens", "64", "--max-num-seqs", "4")
DONE = Asked("completed", ttft_ms=100, gaps_ms=(10, 30), prompt_tokens=100, cached_tokens=60, output_tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("load") / "model"
    write_demo_model(folder, config=replace(TINY, positions=32_768))
    return str(folder)


class TestPlans:
    def test_sessions_come_at_the_rate_and_equal_seeds_plan_alike(self) -> None:
        planned = plans(SMALL, 5, "m")
        assert planned == plans(SMALL, 5, "m") != plans(replace(SMALL, seed=1), 5, "m")
        assert 150 < len(planned) < 250, "200 in the mean, and four deviations"
        arrivals = [plan.arrival_s for plan in planned]
        assert arrivals == sorted(arrivals)
        assert 0 < arrivals[0] < arrivals[-1] < 40
        assert 1.6 < sum(len(plan.bodies) for plan in planned) / len(planned) < 2.4

    def test_two_rates_share_turns_and_pauses_and_no_text(self) -> None:
        slow, fast = (plans(replace(SMALL, seconds=8), rate, "m") for rate in (0.5, 1))
        for one, other in zip(slow, fast, strict=False):
            assert one.arrival_s == pytest.approx(2 * other.arrival_s)
            assert one.pauses_s == other.pauses_s
        systems = {json.loads(plan.bodies[0])["system"][1]["text"] for plan in (slow[0], fast[0])}
        assert len(systems) == 2

    def test_each_request_extends_the_one_before(self) -> None:
        bodies = max((plan.bodies for plan in plans(SMALL, 0.5, "m")), key=len)
        lengths = [len(json.loads(body)["messages"]) for body in bodies]
        assert len(lengths) > 2
        assert lengths == sorted(set(lengths))
        assert all(json.loads(body)["stream"] for body in bodies)


def event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n"


USAGE = {"input_tokens": 1, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 300, "output_tokens": 0}
START = event("message_start", message={"usage": USAGE})
DELTA = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"})
END = event("message_delta", delta={}, usage={"output_tokens": 3}) + event("message_stop")


def answered(*script: str | float, status: int = 200, timeout: float = 20) -> Asked:
    """What `ask` makes of an answer of these texts, with pauses of these seconds between them."""

    async def body() -> AsyncIterator[bytes]:
        for item in script:
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item.encode()

    async def run() -> Asked:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body()))
        async with httpx.AsyncClient(transport=transport, base_url="http://mocked") as client:
            return await ask(client, b"{}", {}, timeout)

    return asyncio.run(run())


class TestAsking:
    def test_ttft_ends_at_the_first_delta_and_gaps_lie_between_two(self) -> None:
        asked = answered(START, 0.05, DELTA, 0.03, DELTA, DELTA, END)
        assert asked.outcome == "completed"
        assert asked.ttft_ms is not None
        assert asked.ttft_ms >= 50
        assert len(asked.gaps_ms) == 2
        assert asked.gaps_ms[0] >= 30
        assert (asked.prompt_tokens, asked.cached_tokens, asked.output_tokens) == (321, 300, 3)

    def test_an_answer_without_text_is_complete_and_has_no_ttft(self) -> None:
        asked = answered(START, END)
        assert (asked.outcome, asked.ttft_ms, asked.gaps_ms) == ("completed", None, ())

    @pytest.mark.parametrize(
        ("asking", "outcome", "error"),
        [
            (lambda: answered("busy", status=529), "refused", "529: busy"),
            (lambda: answered("broken", status=500), "failed", "500: broken"),
            (lambda: answered(START, DELTA, event("error", error={"message": "it broke"})), "failed", "it broke"),
            (lambda: answered(START, DELTA), "failed", "before its message_stop"),
            (lambda: answered(START, "data: {\n\n"), "failed", "JSONDecodeError"),
            (lambda: answered(START, DELTA, 5.0, END, timeout=0.1), "timed out", "within 0.1 s"),
        ],
    )
    def test_what_goes_wrong_is_an_outcome(self, asking: Callable[[], Asked], outcome: str, error: str) -> None:
        asked = asking()
        assert asked.outcome == outcome
        assert error in asked.error

    def test_a_session_that_is_refused_ends_and_others_go_on(self) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            refused = request.headers["x-session"] == "refused"
            return httpx.Response(529 if refused else 200, text="busy" if refused else START + DELTA + END)

        async def run() -> tuple[list[Asked], list[float]]:
            async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://mocked") as client:
                named = [Plan(0.01, {"x-session": name}, (b"{}",) * 3, (0.0,) * 3) for name in ("refused", "served")]
                return await offer(client, named, 0.2, 10, lambda passed: None)

        asked, lags = asyncio.run(run())
        assert [a.outcome for a in asked].count("refused") == 1
        assert [a.outcome for a in asked].count("completed") == 3
        assert len(lags) > 2


class TestSummaries:
    def test_a_request_is_good_within_both_limits(self) -> None:
        config = replace(SMALL, ttft_slo=100, itl_slo=20)
        assert is_good(config, DONE)
        assert is_good(config, replace(DONE, gaps_ms=()))
        assert not is_good(config, replace(DONE, ttft_ms=101))
        assert not is_good(config, replace(DONE, gaps_ms=(10, 31)))
        assert not is_good(config, replace(DONE, ttft_ms=None, gaps_ms=()))
        assert not is_good(config, replace(DONE, outcome="timed out"))

    def test_a_row_counts_what_was_sent_after_the_ramp(self) -> None:
        config = replace(SMALL, ramp=10, seconds=20)
        late = replace(DONE, sent_s=10)
        empty = replace(late, ttft_ms=None, gaps_ms=())
        asked = [DONE, late, replace(late, ttft_ms=9000), empty, Asked("refused", "529", 12), Asked("failed", "no", 13)]
        row = summarise(config, 1, asked, [0.001, 0.002])
        counts = ("offered", "completed", "refused", "failed", "timed_out", "empty", "good")
        assert [row[name] for name in counts] == [5, 3, 1, 1, 0, 1, 1]
        assert (row["offered_per_s"], row["goodput_per_s"], row["attainment"]) == (0.25, 0.05, 0.25)
        assert row["ttft_ms"]["p50"] == 4550
        assert row["itl_ms"]["p50"] == 20
        assert row["cached_share"] == 0.6
        assert row["errors"] == {"529": 1, "no": 1}

    def test_the_sustained_rate_is_the_highest_at_which_nine_in_ten_are_good(self) -> None:
        rows = [{"offered_per_s": n, "attainment": share} for n, share in ((1, 1.0), (2, 0.9), (3, 0.89), (4, None))]
        assert sustained(rows) == 2
        assert sustained(rows[2:]) is None

    def test_rates_at_which_nothing_was_answered_are_drawn_as_gaps(self, tmp_path: Path) -> None:
        rows = [
            summarise(SMALL, rate, asked, [0.001]) for rate, asked in ((1, [DONE]), (2, [Asked("failed")]), (3, []))
        ]
        draw(SMALL, rows, tmp_path / "load.png")
        assert (tmp_path / "load.png").stat().st_size > 10_000


class TestRuns:
    def test_a_run_counts_times_and_draws(self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = "--rates 1 2 --seconds 4 --ramp 1 --turns 2 --pause 0.1 --scale 0.02 --max-tokens 6 --timeout 60"
        path = tmp_path / "made" / "load.json"
        assert main(["--model", model, *sizes.split(), "--out", str(path), "--", *FLAGS]) == 0
        summary = json.loads(path.read_text())
        assert summary["dtype"] == "float32"
        assert summary["server_flags"] == list(FLAGS)
        assert summary["machine"]["cores"]
        assert [row["sessions_per_s"] for row in summary["rows"]] == [1, 2]
        for row in summary["rows"]:
            assert 0 < row["offered"] == row["completed"], row["errors"]
            assert row["refused"] == row["failed"] == row["timed_out"] == 0
            assert 0 <= row["good"] <= row["completed"]
            for name in ("ttft_ms", "itl_ms", "client_lag_ms", "prompt_tokens"):
                assert 0 <= row[name]["p50"] <= row[name]["p95"] <= row[name]["p99"], name
            assert 0 < row["cached_share"] < 1
            assert 1 <= row["tokens_per_event"] < 3
            assert row["cores_used"]["server"] > 0 < row["cores_used"]["clients"]
        assert path.with_suffix(".png").stat().st_size > 10_000
        assert "good/s" in capsys.readouterr().out

    def test_refusals_of_an_endpoint_are_counted_and_end_nothing_else(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = "--rates 30 --seconds 2 --ramp 0 --turns 1 --scale 0.02 --max-tokens 200"
        path = tmp_path / "load.json"
        with running_server(model, *FLAGS, "--max-num-seqs", "1", "--max-queue", "1") as server:
            assert main(["--url", f"{server.url}/", *sizes.split(), "--out", str(path)]) == 0
        (row,) = json.loads(path.read_text())["rows"]
        assert row["refused"] > 0 < row["completed"]
        assert row["offered"] == row["completed"] + row["refused"] == row["sessions"]
        assert all("1 requests are waiting" in error for error in row["errors"])
        assert list(row["cores_used"]) == ["clients"]
        assert "times: 529" in capsys.readouterr().out

    @pytest.mark.parametrize("named", [(), ("--model", "m")])
    def test_a_dead_endpoint_is_an_error_that_names_it(
        self, named: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        assert main(["--url", url, *named, "--out", str(tmp_path / "load.json")]) == 2
        printed = capsys.readouterr().err
        assert f"load: {url}" in printed
        assert "ConnectError" in printed
        assert not list(tmp_path.iterdir())

    def test_a_server_that_does_not_start_is_an_error_with_its_log(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "load.json")]) == 2
        assert "ended with status" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "wrong",
        [
            "--rates 0",
            "--rates 1 1",
            "--seconds 0",
            "--turns 0.5",
            "--itl-slo -1",
            "--url http://x -- --max-num-seqs 8",
        ],
    )
    def test_a_size_that_means_nothing_is_refused_by_name(self, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--model", "m", *wrong.split()])
        assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]

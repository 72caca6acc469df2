"""The batching benchmark at toy sizes, with real engines and a real server: what it counts, never how fast it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.bench.batching import __main__ as batching
from experiments.bench.batching.__main__ import GOALS
from experiments.bench.batching.decode import window_rate
from experiments.bench.batching.prefill import gaps
from experiments.workloads.demo_model import TINY, write_demo_model

TOY = (
    *(
        "--repeats",
        "2",
        "--chunk",
        "64",
        "--llama",
        "tiny",
        "--sessions",
        "1",
        "8",
        "--context",
        "96",
        "--output",
        "24",
    ),
    *("--tokens", "3000", "--concurrent", "2", "--shared", "512", "--requests", "3", "--new", "40"),
)


def asked(*times: float) -> SimpleNamespace:
    """A request whose tokens came at these times."""
    return SimpleNamespace(times=list(times))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny demo model with room for the prompts; do not change it."""
    folder = tmp_path_factory.mktemp("batching") / "model"
    write_demo_model(folder, config=replace(TINY, positions=16_384, end_scale=1.25))
    return folder


@pytest.fixture(scope="module")
def result(model: Path) -> dict:
    """What all parts at toy sizes write: four engines and three servers compile for it, so what needs it is slow."""
    out = model.parent / "batching.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "set_up_jax", lambda: None)  # it would stay so for every later test
        batching.main([*TOY, "--model", str(model), "--out", str(out)])
    return json.loads(out.read_text())


def test_a_rate_counts_the_tokens_of_the_time_in_which_all_decode() -> None:
    assert window_rate([asked(0, 1, 2, 3), asked(1, 2, 3, 4)]) == 4 / 2
    with pytest.raises(ValueError, match="never decoded together"):
        window_rate([asked(0, 1), asked(1, 2)])


def test_a_gap_counts_where_it_ends() -> None:
    assert gaps(asked(0, 1, 3, 6), begin=1, end=5) == [2]


@pytest.mark.slow
def test_every_number_of_sessions_is_measured_in_every_round(result: dict) -> None:
    decode = result["decode"]
    assert {n: len(row["tokens_per_s"]) for n, row in decode["sessions"].items()} == {"1": 2, "8": 2}
    assert decode["sessions"]["1"]["ratio"] == 1
    assert decode["eight_over_one"] == decode["sessions"]["8"]["ratio"] > 0


@pytest.mark.slow
def test_latency_during_a_prefill_is_reported_with_its_yardstick(result: dict) -> None:
    part = result["interference"]
    assert part["chunk"] == 64
    for p50, p95, p99, longest in zip(
        *(part["rounds"][f"itl_{n}_ms"] for n in ("p50", "p95", "p99", "max")), strict=True
    ):
        assert 0 < p50 <= p95 <= p99 <= longest
    rounds = part["rounds"]
    for step, chunk, yardstick in zip(rounds["step_ms"], rounds["chunk_ms"], rounds["yardstick_ms"], strict=True):
        assert yardstick == pytest.approx(step + chunk, abs=1e-3)
    for ms, yardstick, ratio in zip(
        rounds["itl_p99_ms"], rounds["yardstick_ms"], rounds["p99_over_yardstick"], strict=True
    ):
        assert ratio == pytest.approx(ms / yardstick, abs=1e-3)


@pytest.mark.slow
def test_a_shared_prefix_is_computed_once_and_each_suffix_by_itself(result: dict) -> None:
    part = result["shared"]
    assert part["rounds"]["one_computed"] == [512 + 32] * 2
    assert part["rounds"]["many_computed"] == [512 + 3 * 32] * 2
    for one, many, ratio in zip(*(part["rounds"][k] for k in ("one_s", "many_s", "many_over_one")), strict=True):
        assert ratio == pytest.approx(many / one, rel=0.05)


@pytest.mark.slow
def test_a_warm_prompt_reuses_its_prefix_in_the_engine_and_over_http(result: dict) -> None:
    part = result["warm"]
    assert part["rounds"]["reused"] == [2960, 2960]
    assert all(2000 < reused < 3000 for reused in part["rounds"]["http_reused"])
    assert part["http_ttft_ms"] > part["http_pass_ms"] > 0


@pytest.mark.slow
def test_draft_tokens_change_no_token(result: dict) -> None:
    part = result["speculation"]
    assert part["rounds"]["same_text"] == [1.0, 1.0]
    assert part["speculative_token_ms"] > 0
    assert part["break_even"] == pytest.approx(part["verification_ms"] / part["step_ms"] - 1, abs=1e-3)


@pytest.mark.slow
def test_every_goal_is_judged_by_its_own_figure(result: dict) -> None:
    judged = {(goal["part"], goal["what"]): goal for goal in result["goals"]}
    assert len(judged) == len(GOALS)
    for goal in GOALS:
        found = judged[goal.part, goal.text]
        measured = result[goal.part][goal.figure]
        assert found["measured"] == measured
        assert found["reached"] == (measured >= goal.bound if goal.least else measured <= goal.bound)


def test_parts_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "set_up_jax", lambda: None)
    out = tmp_path / "chosen.json"
    batching.main([*TOY, "--only", "decode", "--sessions", "1", "2", "--repeats", "1", "--out", str(out)])
    written = json.loads(out.read_text())
    assert not {"interference", "shared", "warm", "speculation"} & set(written)
    assert written["goals"] == []  # it says nothing of eight
    assert written["commit"]

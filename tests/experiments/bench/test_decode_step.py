"""Where a decode step's time goes, and chunks of few tokens: their sums by hand, and both commands at toy size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.bench import decode_step, prefill_decode, small_chunks
from experiments.bench.ceilings import Ceilings
from experiments.bench.kernel_share import merged, share
from experiments.bench.prefill_decode import Size
from experiments.harness import other_load
from model.config import ModelConfig, RopeConfig

TOY = Size(hidden=128, layers=2, heads=2, kv_heads=1, ffn=96, vocab=256)
LLAMA = ModelConfig("llama", 256, 128, 96, 2, 2, 1, 64, 4096, 1e-5, RopeConfig())


def test_overlapping_intervals_count_once() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_the_share_of_kernels_is_of_the_programs_that_run_any() -> None:
    programs = [(0.0, 10.0), (1.0, 4.0), (20.0, 30.0)]  # the second is a loop's body, the third samples
    assert share(programs, [(1.0, 3.0), (2.0, 4.0), (6.0, 8.0)]) == pytest.approx(0.5)
    assert share(programs, []) is None


def test_the_parts_of_a_step_add_up_to_it() -> None:
    parts = decode_step.split(step_ms=10.0, forward_ms=8.0, sampling_ms=0.5, share=0.75)
    assert parts == {"kernels": 6.0, "xla": 2.0, "sampling": 0.5, "rest": 1.5}
    assert decode_step.split(8.0, 8.0, 0.5, None) == {"kernels": 0.0, "xla": 8.0, "sampling": 0.5, "rest": 0.0}


def test_a_turn_is_split_by_what_the_engines_thread_calls() -> None:
    runner = SimpleNamespace(dispatch=lambda: time.sleep(0.02), sample=lambda: None, collect=lambda: time.sleep(0.01))

    def step() -> None:
        runner.dispatch()
        runner.collect()
        runner.collect()

    core = SimpleNamespace(runner=runner, step=step)
    turns = decode_step.record_turns(core)
    core.step()
    core.step()
    assert len(turns) == 2
    assert all(turn["dispatch"] >= 0.02 and turn["collect"] >= 0.02 and turn["sample"] == 0 for turn in turns)
    assert all(0 <= turn["schedule"] < turn["dispatch"] for turn in turns)


def test_a_chunks_bound_is_the_longer_of_arithmetic_and_memory() -> None:
    need = small_chunks.needed(LLAMA, prefix=32, chunk=16)
    matrices = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 96)
    assert need["mb"] == pytest.approx(4 * (matrices + 256 * 128 + 2 * 2 * 64 * 48) / 1e6)
    pairs = (48**2 - 32**2) / 2
    assert need["gflop"] == pytest.approx((2 * matrices * 16 + 2 * 256 * 128 + 2 * 4 * 128 * pairs) / 1e9)
    row = {"chunk": 16, "gflop": 3.0, "mb": 10.0, "ms": [30.0, 50.0, 90.0]}
    slow_products = small_chunks.with_bound(row, Ceilings({"xla": 100.0}, {"xla": 1.0}))
    assert (slow_products["bound_ms"], slow_products["bound_by"]) == (30.0, "matrix products")
    assert slow_products["goal"] == {"at_least": 0.6, "reached": True}
    slow_memory = small_chunks.with_bound(row | {"chunk": 64}, Ceilings({"xla": 1e3}, {"xla": 0.5}))
    assert (slow_memory["of_bound"], slow_memory["bound_by"], slow_memory["goal"]) == (0.4, "memory", None)


def test_both_commands_run_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prefill_decode.SIZES, "28M", TOY)
    monkeypatch.setattr(decode_step, "ALONE", 2)
    monkeypatch.setattr(decode_step, "read_gbs", lambda count: {"xla": 10.0})
    monkeypatch.setattr(small_chunks, "measure", lambda shapes, sum_bytes: Ceilings({"xla": 10.0}, {"xla": 10.0}))
    flags = ["--models", "28M", "--contexts", "40", "--output", "4", "--repeats", "1"]
    decode_step.main([*flags, "--out", str(tmp_path / "step.json")])
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert set(row["parts_ms"]) == set(decode_step.PARTS)
    assert sum(row["parts_ms"].values()) > 0
    assert set(row["engine_thread_ms"]) == set(decode_step.THREAD)
    assert (tmp_path / "step.png").stat().st_size > 1000
    small_chunks.main(
        ["--chunks", "1", "5", "--prefixes", "0", "40", "--repeats", "1", "--out", str(tmp_path / "chunks.json")]
    )
    rows = json.loads((tmp_path / "chunks.json").read_text())["rows"]
    assert [(row["prefix"], row["chunk"], row["goal"] is not None) for row in rows] == [
        (0, 1, False),
        (0, 5, True),
        (40, 1, False),
        (40, 5, True),
    ]
    assert (tmp_path / "chunks.png").stat().st_size > 1000


def test_the_load_of_others_leaves_this_process_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own = iter([0.0, 10.0]), iter([1.0, 5.0])
    monkeypatch.setattr(other_load, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(other_load, "_busy_s", iter([100.0, 112.0]).__next__)
    monkeypatch.setattr(other_load, "_own_s", lambda process: next(own))
    monkeypatch.setattr(other_load.psutil, "cpu_count", lambda: 2)
    assert other_load.start_watch()() == 0.4
    assert "40%" in other_load.warning(0.4)
    assert other_load.warning(0.01) == ""

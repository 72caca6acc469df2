"""The calibration's own arithmetic: constants that are put into timings come out, and the simulator agrees."""

from __future__ import annotations

from statistics import median

import pytest

from experiments.bench.calibration import PAGE, REPLICAS, cores_of, engine_of, plan_of, simulated, timings_of
from experiments.harness.client import Timing
from serve.cost.model import Constants

TRUE = Constants(0.01, 1e-4, 2e-8, 1e-7)


def talk(first: int, grown: int, turns: int = 6, slowness: float = 1.0) -> list[Timing]:
    """A session that finds each prompt's predecessor, on a machine that takes so many times as long."""
    sizes = [first + grown * turn**2 for turn in range(turns)]
    found = [0, *(size // PAGE * PAGE for size in sizes)]
    return [
        Timing(ttft := 1e3 * slowness * TRUE.ttft_s(size, hit), ttft + 7 * 2.0 * slowness, size, hit, 8, "")
        for size, hit in zip(sizes, found, strict=False)
    ]


def test_constants_are_found_and_replayed() -> None:
    talks = [talk(1000, 300), talk(3000, 170), talk(500, 900), talk(2000, 610)]
    engine = engine_of(timings_of([talks]), num_pages=4096)
    assert engine.constants.linear == pytest.approx(TRUE.linear, rel=1e-3)
    assert engine.constants.attention == pytest.approx(TRUE.attention, rel=1e-3)
    assert engine.step_s == pytest.approx(2e-3)
    said = simulated(plan_of(talks), engine, cores=4.0)
    real = median(timing.ttft_ms for each in talks for timing in each)
    assert said["ttft_p50_ms"] == pytest.approx(real, rel=0.1), "one agent on each: none waits"
    assert said["hit_rate"] == pytest.approx(
        sum(t.cached_tokens for each in talks for t in each) / sum(t.prompt_tokens for each in talks for t in each),
        abs=0.01,
    )


def test_shared_cores_are_found_and_slow_the_replay() -> None:
    sizes = [(1000, 600), (1100, 600), (1050, 610), (950, 620)]
    engine = engine_of(timings_of([[talk(*size) for size in sizes]]), num_pages=4096)
    together = [talk(*size, slowness=2.5) for size in sizes]
    cores = cores_of([together], engine)
    assert cores == pytest.approx(REPLICAS / 2.5, rel=0.1)
    assert cores_of([[talk(*size) for size in sizes]], engine) == pytest.approx(REPLICAS, rel=0.1)
    said = simulated(plan_of(together), engine, cores)
    real = median(timing.ttft_ms for each in together for timing in each)
    assert said["ttft_p50_ms"] == pytest.approx(real, rel=0.1)

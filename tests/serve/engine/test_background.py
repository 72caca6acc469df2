"""An engine that serves while its shapes are compiled: who waits for what, and what a later process finds."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import ModelConfig
from model.params import Params
from serve.engine.buckets import Bucket, SamplingParams
from serve.engine.engine import Engine
from serve.engine.programs import Program, Programs
from serve.engine.request import Finished
from serve.engine.runtime import user_cache
from tests.helpers.tiny_engine import SMALL, VOCAB, assert_same_or_tied, generate, outcome, reference, submit

ROOT = Path(__file__).parents[3]
LAZY = replace(SMALL, compile_in_background=True, speculative_tokens=2)
BASE = 5  # programs: a chunk and a decoding step, each with its sampling, and the copy of a page
Model = tuple[ModelConfig, Params]


@pytest.fixture
def idle_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The background compiles nothing."""
    monkeypatch.setattr(Programs, "start", lambda self: None)


@pytest.fixture
def lazy(model: Model) -> Iterator[Callable[[], Engine]]:
    """Makes engines that compile in the background, and stops them."""
    made: list[Engine] = []

    def make() -> Engine:
        made.append(Engine(model[1], model[0], LAZY))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
        if engine.core.programs.thread:
            engine.core.programs.thread.join(60)


def draw(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)


@pytest.mark.usefixtures("idle_compiler")
def test_two_shapes_serve_prompts_answers_and_drafts_of_any_number_of_requests(
    lazy: Callable[[], Engine], model: Model
) -> None:
    engine = lazy()
    assert engine.core.programs.by_state()["ready"] == BASE
    engine.start()
    prompts = [draw(i, length) for i, length in enumerate((1, 20, 90, 33, 150))]
    asked = [submit(engine, prompt, 12)[0] for prompt in prompts]
    known: dict[Any, Any] = {}
    flips: list[Any] = []
    for prompt, events in zip(prompts, asked, strict=True):
        tokens, _, end = outcome(events)
        assert end == Finished("length")
        assert_same_or_tied(model, prompt, tokens, reference(model, prompt, 12, known), flips)
    assert engine.core.programs.by_state()["ready"] == BASE


@pytest.mark.usefixtures("idle_compiler")
def test_a_request_with_a_temperature_waits_for_nothing_and_gets_the_same_tokens_later(
    lazy: Callable[[], Engine],
) -> None:
    engine = lazy()
    engine.start()
    random, greedy = (SamplingParams(temperature=heat, seed=3) for heat in (0.8, 0.0))
    early = [generate(engine, draw(1, 20), 6, sampling=sampling, salt=b"early")[0] for sampling in (random, greedy)]
    assert engine.core.programs.by_state()["ready"] == BASE
    assert engine.compiled == (2, len(engine.core.runner.buckets))
    engine.core.runner.steps.wait()
    later = [generate(engine, draw(1, 20), 6, sampling=sampling, salt=b"later")[0] for sampling in (random, greedy)]
    assert later == early
    assert engine.compiled == (len(engine.core.runner.buckets),) * 2


@pytest.mark.usefixtures("idle_compiler")
def test_the_shape_that_a_step_could_have_used_is_compiled_next(lazy: Callable[[], Engine]) -> None:
    engine = lazy()
    programs, steps = engine.core.programs, engine.core.runner.steps
    engine.start()
    assert programs.remaining()[0].name.startswith("greedy sampling")
    generate(engine, draw(2, 9), 2)
    assert programs.remaining()[0] is steps.by_bucket[Bucket(1, 1)][0]
    assert [program for program in programs.remaining() if program.needed][-1] is steps.by_bucket[Bucket(1, 16)][0]
    steps.wait()
    assert set(steps.ready()) == set(engine.core.runner.buckets)


def test_a_shape_that_cannot_be_compiled_is_reported_and_the_next_larger_one_serves(
    lazy: Callable[[], Engine], model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, load_or_compile = f"step {Bucket(1, 16)}", Programs._load_or_compile

    def failing(programs: Programs, program: Program) -> Any:
        if program.name == broken:
            raise RuntimeError("a fault of the test")
        return load_or_compile(programs, program)

    monkeypatch.setattr(Programs, "_load_or_compile", failing)
    with caplog.at_level(logging.WARNING):
        engine = lazy()
        engine.start()
        assert engine.core.programs.thread
        engine.core.programs.thread.join(120)
        prompt = draw(4, 12)
        tokens, _, _ = generate(engine, prompt, 5)
    assert_same_or_tied(model, prompt, tokens, reference(model, prompt, 5, {}), [])
    assert engine.core.programs.by_state() | {"ready": 0} == {"pending": 0, "compiling": 0, "ready": 0, "failed": 1}
    assert (
        caplog.text.count(f"{broken} cannot be compiled, and is done without: RuntimeError: a fault of the test") == 1
    )


def test_an_engine_stops_at_once_in_the_middle_of_a_compilation(
    lazy: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    load_or_compile = Programs._load_or_compile

    def held(programs: Programs, program: Program) -> Any:
        if threading.current_thread() is programs.thread:
            begun.set()
            assert go.wait(60)
        return load_or_compile(programs, program)

    monkeypatch.setattr(Programs, "_load_or_compile", held)
    engine = lazy()
    engine.start()
    assert begun.wait(60)
    begin = time.monotonic()
    engine.stop()
    assert time.monotonic() - begin < 5
    assert not engine.thread.is_alive()
    go.set()


CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import jax
from serve.engine import steps
from serve.engine.engine import Engine
from tests.helpers.cold_reference import CONFIG, SETTINGS, parameters
from tests.helpers.tiny_engine import generate

traced = []
traces = steps.logits_step
def counted(*args, **kwargs):
    traced.append(1)
    return traces(*args, **kwargs)
counted.__module__, counted.__qualname__ = traces.__module__, traces.__qualname__
steps.logits_step = counted
settings = replace(SETTINGS, max_num_seqs=1, max_prefill_tokens=8, speculative_tokens=0, compile_in_background=True)
engine = Engine(parameters(), CONFIG, settings)
first = engine.core.programs.by_state()["ready"]
engine.start()
tokens = generate(engine, np.arange(3, 30), 10)[0]
engine.core.programs.thread.join()
engine.stop()
found = engine.core.programs
print(json.dumps([tokens, len(traced), found.loaded, found.compiled, found.by_state()["ready"]]))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_later_process_loads_everything_without_tracing_and_answers_the_same(tmp_path: Path, devices: int) -> None:
    (tmp_path / "tokenzero").mkdir()
    (user_cache() / "kernels").mkdir(parents=True, exist_ok=True)
    (tmp_path / "tokenzero" / "kernels").symlink_to((user_cache() / "kernels").resolve())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, cwd=ROOT)
        runs.append(json.loads(done.stdout))
    (tokens, traced, loaded, compiled, ready), (again, *later) = runs
    assert again == tokens
    assert (loaded, compiled) == (0, ready)
    assert traced > 0
    assert later == [0, ready, 0, ready]

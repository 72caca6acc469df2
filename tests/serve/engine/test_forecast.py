"""What a request is expected to find and to take: by a pure function of the engine as it arrives, and not a use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cache.tiers import StoredPage
from serve.cost.model import Constants, CostModel, Rate
from serve.cost.steps import StepCosts
from serve.engine.engine import Engine
from serve.engine.forecast import MOST_OTHERS, Arrival, Forecaster, Prefill, Timetable
from serve.engine.request import GenerationRequest
from tests.helpers.sequences import waiting
from tests.helpers.tiny_engine import ALWAYS, PAGE, SMALL, generate, prompt, submit, tick, tiers_of

A_TOKEN = Constants(fixed=0.0, linear=1.0, attention=0.0)  # a second each
TIMETABLE = Timetable(StepCosts(A_TOKEN), lambda start, stop: stop - start, lambda count, decoding: count, 100, 20)


def arrival(**fields) -> Arrival:
    known = {
        "tokens": 1000,
        "cached": {"device": 640},
        "others": (),
        "sibling_s": 0.0,
        "contexts": (),
        "place_s": 0.0,
        "timetable": TIMETABLE,
        "reads": CostModel(1.0, 0.0, Rate(1.0)),
        "brought": {"disk": Rate(10.0)},
        "page_size": 64,
        "page_bytes": 40,
    }
    return Arrival(**(known | fields))


def test_a_request_alone_takes_its_own_steps() -> None:
    found = arrival().forecast()
    assert (found.cached, found.wait_s, found.restore_s, found.prefill_s) == ({"device": 640}, 0, 0, 360)


def test_one_that_is_cached_whole_computes_its_last_token() -> None:
    found = arrival(cached={"device": 999}).forecast()
    assert (found.cached["device"], found.prefill_s) == (999, 1)


def test_a_short_one_waits_for_a_chunk_of_a_long_one_and_a_long_one_for_all() -> None:
    long = Prefill(0, 10_000, waited_s=1.0)
    short = arrival(cached={"device": 950}, others=(long,)).forecast()
    assert short.wait_s == 100, "one chunk, after which it has waited for long enough to pass"
    equal = arrival(cached={"device": 0}, others=(Prefill(0, 1000, waited_s=5.0),)).forecast()
    assert (equal.wait_s, equal.prefill_s) == (1000, 1000)


def test_pages_of_a_tier_are_read_where_that_is_sooner_and_while_others_compute() -> None:
    pages = [StoredPage(10, b"a", 64, "disk"), StoredPage(11, b"b", 30, "disk")]
    found = arrival().forecast(pages)
    assert found.cached == {"device": 640, "disk": 94}
    assert (found.restore_s, found.prefill_s) == (8, 266), "two pages of 40 bytes at 10 a second"
    assert found.ttft_s == 274
    slow = arrival(reads=CostModel(1.0, 0.0, Rate(1.0), reads={"disk": Rate(0.1)})).forecast(pages)
    assert slow.cached == {"device": 640}
    busy = arrival(others=(Prefill(0, 100, waited_s=1e6),)).forecast(pages)
    assert busy.ttft_s == max(100, 8) + 266


def test_a_partly_cached_page_counts_once() -> None:
    found = arrival(cached={"device": 650}).forecast([StoredPage(10, b"a", 64, "disk")])
    assert found.cached == {"device": 650, "disk": 54}


def test_much_work_is_foreseen_in_few_looks() -> None:
    looks = []

    def shape(count: int, decoding: int) -> int:
        looks.append(count)
        return count

    table = replace(TIMETABLE, shape=shape)
    found = arrival(tokens=10**6, cached={}, timetable=table).forecast()
    assert found.prefill_s == pytest.approx(10**6, rel=0.01)
    assert len(looks) < 1000


@pytest.mark.parametrize("others", [1, 8, MOST_OTHERS])
def test_many_that_come_before_are_foreseen_in_few_looks_too(others: int) -> None:
    looks = []

    def prefill_s(start: int, stop: int) -> float:
        looks.append(start)
        return stop - start

    before = tuple(Prefill(0, 50_000 + each, waited_s=each) for each in range(others))
    found = arrival(
        tokens=60_000, cached={}, others=before, timetable=replace(TIMETABLE, prefill_s=prefill_s)
    ).forecast()
    assert found.wait_s > 40_000 * others
    assert len(looks) < 5000


def test_behind_a_crowd_nothing_is_foreseen_and_nothing_is_looked_up() -> None:
    core: Any = SimpleNamespace(
        costs=SimpleNamespace(model=CostModel(1.0, 0.0, Rate(1.0))),
        runner=SimpleNamespace(tracker=SimpleNamespace(costs=lambda known: StepCosts(A_TOKEN))),
        settings=SMALL,
        running=[],
        waiting=[waiting(number) for number in range(MOST_OTHERS + 1)],
        memory=None,
    )
    assert Forecaster(core).arrival(waiting(99)) is None


@pytest.fixture
def engine(model, tmp_path):
    config, params = model
    engine = Engine(params, config, SMALL, b"fingerprint", tiers_of(tmp_path))
    engine.core.costs.model = ALWAYS
    engine.start()
    yield engine
    engine.stop()


def forecast(engine, tokens, **options):
    return asyncio.run(engine.forecast(GenerationRequest(np.asarray(tokens, np.int32), 1, **options)))


def test_a_question_is_answered_as_the_request_then_reads_and_is_no_use(engine) -> None:
    first, second = prompt(1), prompt(2)
    generate(engine, first, 4)
    generate(engine, second, 4)
    tree = engine.core.memory.prefix_cache.tree
    used = [(node.start, node.last_used) for node in tree.nodes()]
    for tokens in (first, second, np.concatenate([first[:100], second[:50]]), prompt(3)):
        asked = forecast(engine, tokens)
        assert [(node.start, node.last_used) for node in tree.nodes()] == used
        _, started, _ = generate(engine, tokens, 1)
        assert (asked.tokens, sum(asked.cached.values())) == (len(tokens), started.reused_tokens)
        assert started.forecast.cached == asked.cached
        assert 0 < asked.ttft_s < 60
        used = [(node.start, node.last_used) for node in tree.nodes()]
    assert not engine.core.memory.prefix_cache.live


def test_another_salt_finds_nothing(engine) -> None:
    tokens = prompt(4)
    generate(engine, tokens, 1, salt=b"one")
    assert forecast(engine, tokens, salt=b"one").cached == {"device": len(tokens) - 1}
    assert forecast(engine, tokens, salt=b"two").cached == {"device": 0}


def test_what_only_a_tier_has_is_told_by_its_name_and_not_touched(model, tmp_path) -> None:
    config, params = model
    tokens = prompt(5)
    for _ in range(2):  # the second one starts with an empty device
        engine = Engine(params, config, SMALL, b"fingerprint", tiers_of(tmp_path))
        engine.core.costs.model = ALWAYS
        engine.start()
        disk = engine.core.tiers.pages.tiers[0]
        recent = disk.recent(engine.core.restorer.page_bytes, 1000)
        asked = forecast(engine, tokens)
        assert disk.recent(engine.core.restorer.page_bytes, 1000) == recent
        _, started, _ = generate(engine, tokens, 1)
        assert started.forecast.cached == asked.cached == {"device": 0} | started.restored
        engine.stop()
    assert asked.cached == {"device": 0, "disk": (len(tokens) - 1) // PAGE * PAGE}
    assert asked.restore_s > 0


def test_a_sibling_that_computes_the_same_prompt_counts_as_cached(model) -> None:
    config, params = model
    engine = Engine(params, config, SMALL)
    long = prompt(6, 200)
    submit(engine, long, 4)
    tick(engine)
    events, _ = submit(engine, np.concatenate([long[:150], prompt(7, 20)]), 1)
    tick(engine)
    (sequence,) = [each for each in [*engine.core.running, *engine.core.waiting] if each.length == 170]
    expected = sequence.forecast
    assert expected.cached == {"device": 150}
    assert expected.wait_s > 0
    while tick(engine):
        pass
    started = events.get_nowait()
    assert started.reused_tokens >= 150
    assert started.forecast == expected


def test_an_engine_that_has_stopped_says_nothing(model) -> None:
    config, params = model
    engine = Engine(params, config, SMALL)
    engine.start()
    engine.stop()
    assert forecast(engine, prompt(8)) is None

"""What an agent's latest prompt had comes back while its next request is still being received."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.read_ahead import AGENTS
from tests.helpers.http import eventually
from tests.helpers.tiny_engine import ALWAYS, CRAMPED, PAGE, assert_same_or_tied, generate, prompt, reference, tiers_of

LENGTH = 200


@pytest.fixture
def engine(model, tmp_path):
    """An engine whose pool has no room for two prompts, after agent `a`'s and then another's."""
    config, params = model
    engine = Engine(params, config, replace(CRAMPED, audit_pages=CRAMPED.audit_pages), b"print", tiers_of(tmp_path))
    engine.core.costs.model = ALWAYS
    engine.start()
    generate(engine, prompt(1, LENGTH), 2, agent="a")
    for seed in (2, 3):
        generate(engine, prompt(seed, LENGTH), 2, agent=f"other {seed}")
    yield engine
    engine.stop()
    engine.core.memory.prefix_cache.check()


def preloaded(engine):
    return engine.core.memory.prefix_cache.preloaded


def test_its_next_request_takes_over_pages_that_were_read_before_it_came(model, engine) -> None:
    assert engine.core.memory.cached_tokens(engine.read_ahead.latest["a"]) < LENGTH // 2, "some of it is gone"
    engine.expect("a")
    eventually(lambda: len(preloaded(engine)) >= 5, "pages are read ahead")
    tokens = np.concatenate([prompt(1, LENGTH), prompt(4, 20)])
    output, started, _ = generate(engine, tokens, 3, agent="a")
    assert preloaded(engine).taken >= 5
    assert started.reused_tokens >= LENGTH // PAGE * PAGE - PAGE
    assert_same_or_tied(model, tokens, output, reference(model, tokens, len(output), {}), [])


def test_a_name_that_lies_changes_no_answer_and_an_unknown_one_reads_nothing(model, engine) -> None:
    engine.expect("nobody")
    assert forecastless(engine) == 0
    engine.expect("a")
    eventually(lambda: len(preloaded(engine)) >= 5, "pages are read ahead")
    tokens = prompt(5, LENGTH)
    output, started, _ = generate(engine, tokens, 3, agent="a")
    assert (started.reused_tokens, preloaded(engine).taken) == (0, 0)
    assert_same_or_tied(model, tokens, output, reference(model, tokens, len(output), {}), [])


def forecastless(engine) -> int:
    """Pages that are preloaded after the engine has had a turn."""
    generate(engine, prompt(6, 20), 1)
    return len(preloaded(engine))


def test_few_agents_are_remembered(model, engine) -> None:
    for number in range(AGENTS + 3):
        generate(engine, prompt(7, 10), 1, agent=str(number))
    assert len(engine.read_ahead.latest) == AGENTS
    assert "a" not in engine.read_ahead.latest

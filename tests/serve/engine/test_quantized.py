"""Engines over quantised weights: a warm cache changes no token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from tests.helpers.cold_reference import CONFIG, PAGE, SETTINGS
from tests.helpers.quantized import quantized_params
from tests.helpers.tiny_engine import generate
from tests.model.test_cpu_layers import random_params

ALONE = replace(SETTINGS, max_num_seqs=1, speculative_tokens=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_greedy_answers_after_a_reused_prefix_are_those_without_one(bits: int) -> None:
    params = arranged(quantized_params(random_params(CONFIG), bits, group=32), PAGE)
    engine = Engine(params, CONFIG, ALONE, b"quantised")
    engine.start()
    prompt = np.random.default_rng(15).integers(3, CONFIG.vocab_size, 30).tolist()
    first, started, _ = generate(engine, prompt, 10)
    assert started.reused_tokens == 0
    longer = [*prompt, *first, 5, 6]
    warm, started, _ = generate(engine, longer, 10)
    assert started.reused_tokens >= len(prompt)
    cold, started, _ = generate(engine, longer, 10, salt=b"another")
    assert started.reused_tokens == 0
    engine.stop()
    assert warm == cold
    assert len(set(warm)) > 1

"""Layers of several kinds, experts and windows: our logits against transformers' in float32, however a prompt comes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.kv import copy_pages
from tests.model.conftest import OF_KINDS
from tests.model.test_decoder import PAGE, Runner, assert_equal_logits, ragged_logits, shuffled_pages

LENGTH = 150
TIE = 1e-5  # of the scores by which experts are chosen
BY_XLA = ("qwen3_moe-mixed", "gpt_oss", "glm4_moe")  # with all kinds among them; the others are slow tests


@functools.cache
def expected(folder: Path, tokens: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Transformers' logits [tokens, vocab], and how many tokens come before the first whose choice is nearly a tie.

    Of a tie, either choice is right, and all later tokens differ with it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps: list[torch.Tensor] = []

    def seen(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        correction = getattr(router, "e_score_correction_bias", None)
        scores = output[0] if correction is None else output[0].sigmoid() + correction
        best = scores.sort(descending=True).values
        gaps.append(best[:, router.top_k - 1] - best[:, router.top_k])

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router", "mixer.gate")) and hasattr(module, "top_k"):
            module.register_forward_hook(seen)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    tied = (torch.stack(gaps).amin(0) < TIE).numpy() if gaps else np.zeros(len(tokens), bool)
    return logits, int(tied.argmax()) if tied.any() else len(tokens)


@pytest.fixture(scope="module")
def prompt() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 120, LENGTH)


@pytest.fixture(params=OF_KINDS, ids=[name for name, *_ in OF_KINDS])
def of_kinds(request, tiny_checkpoint):
    """The checkpoint folder of each entry of OF_KINDS in turn."""
    _, family, overrides = request.param
    return tiny_checkpoint(family, **overrides)


def untied(folder: Path, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prompt up to the first tie, and transformers' logits for it."""
    logits, count = expected(folder, tuple(prompt.tolist()))
    assert count > LENGTH // 2, "a tie in routing leaves too little to compare"
    return prompt[:count], logits[:count]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in BY_XLA else pytest.mark.slow) for name in (name for name, *_ in OF_KINDS)],
)
def test_logits_of_stacked_layers_under_xla_equal_transformers(name, tiny_checkpoint, prompt):
    _, family, overrides = next(each for each in OF_KINDS if each[0] == name)
    folder = tiny_checkpoint(family, **overrides)
    tokens, logits = untied(folder, prompt)
    assert_equal_logits(Runner(folder, stacked=True).in_chunks(tokens, 1024, shuffled_pages()), logits)


def test_logits_equal_transformers_however_the_prompt_comes(of_kinds, prompt):
    prompt, logits = untied(of_kinds, prompt)

    def equal(actual: np.ndarray, start: int = 0) -> None:
        assert_equal_logits(actual, logits[start : start + len(actual)])

    runner, pages, other = Runner(of_kinds), shuffled_pages(), shuffled_pages(2)
    equal(runner.in_chunks(prompt, 1024, pages))
    equal(runner.in_chunks(prompt[:101], 64, pages))
    equal(runner.in_chunks(prompt[:120], 1, pages, prefix=101), 101)
    equal(runner.in_chunks(prompt[:60], 7, pages))
    # Another prompt computed the first 53 tokens; the match ends inside a page, which is copied.
    reused = 53
    runner.in_chunks(np.concatenate([prompt[:reused], np.full(20, 5)]), 1024, pages)
    whole = reused // PAGE
    mine = np.concatenate([pages[:whole], [page for page in other if page not in pages][: 40 - whole]])
    runner.pool = copy_pages(runner.pool, pages[whole : whole + 1], mine[whole : whole + 1])
    equal(runner.in_chunks(prompt, 33, mine, prefix=reused), reused)


def test_a_ragged_batch_with_padding_equals_its_sequences_alone(of_kinds, prompt):
    """Padding is of one token that real ones are too, so that it would crowd its experts if it were counted."""
    logits, count = expected(of_kinds, tuple(prompt.tolist()))
    assert count > 64
    found = ragged_logits(Runner(of_kinds), prompt, np.full(116, prompt[0]))
    assert_equal_logits(found, logits[[50, 63, 19]])

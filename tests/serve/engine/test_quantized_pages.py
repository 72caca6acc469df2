"""KV pages of 8 bits: reuse gives the same answers as computing, from the device, the tiers and after a restart."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import Batch
from model.checkpoint import layout
from model.decoder import forward
from model.kernels.cpu import build
from model.kernels.dispatch import arranged
from model.kv import KVPool, empty_pool, gather_pages
from model.kv_rows import QUANTIZED, decode, encode, pool_dtype
from model.params import Params, unstacked
from serve.audit.comparison import distances
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from tests.helpers.cold_reference import CONFIG, VOCAB
from tests.helpers.tiny_engine import ALWAYS, PAGE, generate, tiers_of

SETTINGS = EngineSettings(num_pages=64, max_model_len=192, page_size=PAGE, max_num_seqs=1, max_prefill_tokens=32)
# Of the logits' scale. Another chunking changes rounding; where that takes a number to its row's next step, it is by
# this much, not by 1e-6, that what follows may change.
BOUND = {"int8": 5e-3, "fp8": 5e-2}

one_shot = jax.jit(forward, static_argnames="config")


@pytest.fixture(scope="module")
def weights() -> Params:
    """Random weights of a tiny model."""
    rng = np.random.default_rng(0)

    def leaf(spec):
        norm = len(spec.shape) <= 2 and "norm" in spec.parts[0].name
        return jnp.ones(spec.shape) if norm else jnp.asarray(rng.normal(size=spec.shape) * 0.2, jnp.float32)

    return jax.tree.map(leaf, layout(CONFIG))


@pytest.fixture(params=["CPU kernels", pytest.param("XLA", marks=pytest.mark.slow)])
def params(request: pytest.FixtureRequest, weights: Params) -> Params:
    """The weights as either path takes them."""
    if request.param == "XLA":
        return unstacked(weights)
    if not build.available():
        pytest.skip("the CPU kernels cannot be built here: their log line says why")
    return arranged(weights, PAGE)


@pytest.fixture(params=QUANTIZED)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of quantised pages in turn."""
    return request.param


def started(params: Params, kind: str | None, folder=None) -> Engine:
    """An engine over a store, which restores whatever is there."""
    tiers = tiers_of(folder) if folder else None
    engine = Engine(params, CONFIG, replace(SETTINGS, kv_dtype=kind), b"fingerprint", tiers)
    if tiers:
        engine.core.costs.model = ALWAYS
    engine.start()
    return engine


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)


def cold(params: Params, kind: str, tokens: np.ndarray) -> tuple[np.ndarray, KVPool]:
    """The logits after `tokens`, computed at once on an empty pool, [vocab], and the pool."""
    size = SETTINGS.max_model_len
    batch = Batch(
        tokens=np.pad(tokens, (0, size - len(tokens))),
        starts=np.asarray([0, len(tokens)], np.int32),
        prefix=np.zeros(1, np.int32),
        block_table=np.arange(size // PAGE, dtype=np.int32)[None],
        logit_indices=np.asarray([len(tokens) - 1], np.int32),
        max_chunk=size,
    )
    pool = empty_pool(CONFIG, size // PAGE, PAGE, pool_dtype(kind))
    logits, pool = one_shot(params, batch, pool, CONFIG)
    return np.asarray(logits)[0], pool


def assert_greedy(params: Params, kind: str, tokens: np.ndarray, answer: list[int]) -> None:
    """Each token of an answer is the likeliest of a cold pass, or within BOUND of it."""
    for at, token in enumerate(answer):
        logits = cold(params, kind, np.concatenate([tokens, np.asarray(answer[:at], np.int32)]))[0]
        assert logits.max() - logits[token] <= BOUND[kind] * np.abs(logits).max(), f"token {at}"


def test_answers_on_reused_and_restored_pages_are_those_of_a_cold_pass(params, kind, tmp_path):
    tokens = prompt(0, 100)
    engine = started(params, kind, tmp_path)
    first, computed, _ = generate(engine, tokens, 12)
    again, warm, _ = generate(engine, tokens, 12)
    longer = np.concatenate([tokens, np.asarray(first, np.int32), prompt(1, 21)])
    third, extended, _ = generate(engine, longer, 12)
    engine.stop()
    assert (computed.reused_tokens, warm.reused_tokens, extended.reused_tokens) == (0, 99, 111)
    assert_greedy(params, kind, tokens, first)
    assert_greedy(params, kind, tokens, again)
    assert_greedy(params, kind, longer, third)

    engine = started(params, kind, tmp_path)
    restored, found, _ = generate(engine, tokens, 12)
    engine.stop()
    assert found.reused_tokens == found.restored["disk"] == 99, "the partly filled page comes back, too"
    assert_greedy(params, kind, tokens, restored)


@pytest.mark.skipif(not build.available(), reason="the CPU kernels cannot be built here")
def test_both_paths_write_the_same_rows_but_for_a_step(weights, kind):
    tokens = prompt(6, 100)
    pools = [cold(each, kind, tokens)[1] for each in (unstacked(weights), arranged(weights, PAGE))]
    for one, other in zip(*map(jax.tree.leaves, pools), strict=True):
        ours, theirs = (np.asarray(decode(side, jnp.float32)) for side in (one, other))
        largest = np.abs(ours).max(-1, keepdims=True)
        assert (np.abs(ours - theirs) <= 1.01 * largest / (127 if kind == "int8" else 8)).all()
        assert (np.abs(ours - theirs) > 1e-5 * largest).mean() < 0.01


def test_a_page_keeps_its_bits_when_more_tokens_come_and_through_the_store(params, kind, tmp_path):
    tokens = prompt(2, 83)  # a page is left with three tokens

    def rows(engine: Engine) -> list[np.ndarray]:
        """The rows of all tokens: whole pages, and what is filled of the last."""
        numbers, length = engine.core.memory.prefix_cache.tree.match(tokens, b"")
        assert length == len(tokens)
        *whole, last = np.asarray(gather_pages(engine.core.memory.pool, np.asarray(numbers)))
        return [*whole, last[..., : length % PAGE, :]]

    engine = started(params, kind, tmp_path)
    generate(engine, tokens, 1)
    before = rows(engine)
    generate(engine, np.concatenate([tokens, prompt(3, 40)]), 1)
    after = rows(engine)
    engine.stop()
    jax.tree.map(np.testing.assert_array_equal, after, before)
    engine = started(params, kind, tmp_path)
    generate(engine, np.concatenate([tokens, prompt(4, 9)]), 1)
    jax.tree.map(np.testing.assert_array_equal, rows(engine), before)
    engine.stop()


def test_pages_of_another_dtype_are_never_found(params, tmp_path):
    tokens = prompt(5, 60)
    for count, kind in enumerate((None, "int8", "fp8", None, "int8")):
        engine = started(params, kind, tmp_path)
        _, found, _ = generate(engine, tokens, 2)
        engine.stop()
        assert found.reused_tokens == (56 if count > 2 else 0)


def test_an_audit_compares_what_rows_stand_for(kind):
    rng = np.random.default_rng(0)
    shape = (4, 2, CONFIG.num_layers, CONFIG.num_kv_heads, PAGE, CONFIG.head_dim)
    ours, theirs = (encode(jnp.asarray(rng.normal(size=shape), jnp.float32), pool_dtype(kind)) for _ in range(2))
    numbers = [decode(each, jnp.float32) for each in (ours, theirs)]
    errors, sizes = distances(ours, theirs)
    np.testing.assert_allclose(errors, np.abs(numbers[0] - numbers[1]).max((3, 5)))
    np.testing.assert_allclose(sizes, np.abs(numbers[0]).max((3, 5)))

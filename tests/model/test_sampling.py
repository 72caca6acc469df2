"""Sampling: greedy, temperature, top-k, top-p, masks, and draws that do not depend on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from model import sampling as ours
from model.sampling import Sampling

# Compiled, as the engine runs them.
greedy, sample, threshold = (jax.jit(function) for function in (ours.greedy, ours.sample, ours.threshold))


def sampling(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0, mask=None):
    return Sampling(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        seeds=jnp.asarray(np.broadcast_to(seed, rows), jnp.uint32),
        positions=jnp.asarray(np.broadcast_to(position, rows), jnp.int32),
        mask=mask,
    )


def draws(row, count, **options):
    logits = jnp.tile(jnp.asarray(row, jnp.float32), (count, 1))
    return np.asarray(sample(logits, sampling(count, position=np.arange(count), **options)))


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)), jnp.float32)
    assert sample(logits, sampling(5, temperature=0.0)).tolist() == np.argmax(logits, -1).tolist()


def test_draws_follow_the_softmax_distribution() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draws(np.log(probs), 20_000), minlength=4) / 20_000
    np.testing.assert_allclose(counts, probs, atol=0.015)


def test_top_k_keeps_the_k_most_likely_tokens() -> None:
    assert set(draws([1.0, 3.0, 2.0, 0.5], 500, top_k=2)) == {1, 2}
    assert set(draws([1.0, 3.0, 2.0, 0.5], 50, top_k=1)) == {1}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    row = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(row, 500, top_p=0.75)) == {0, 1}
    assert set(draws(row, 500, top_p=0.81)) == {0, 1, 2}
    assert set(draws(row, 50, top_p=0.01)) == {0}


def test_top_p_counts_what_top_k_has_left() -> None:
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(draws(row, 500, top_k=2, top_p=0.5)) == {0}
    assert set(draws(row, 500, top_k=2, top_p=0.6)) == {0, 1}
    assert set(draws(row, 500, top_k=3, top_p=0.7)) == {0, 1}


def kept_by_transformers(logits, top_k, top_p):
    """Which tokens transformers would draw from, [rows, vocab]."""
    scores = torch.tensor(logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return np.isfinite(scores.numpy())


def kept(logits, top_k, top_p):
    """Which tokens are drawn from, [rows, vocab]."""
    rows = len(logits)
    least = threshold(jnp.asarray(logits), jnp.full(rows, top_k), jnp.full(rows, top_p, jnp.float32))
    return logits >= np.asarray(least)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 40, 300, 5000])
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p):
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(60, 300)).astype(np.float32) * rng.uniform(0.1, 6, (60, 1)).astype(np.float32)
    assert np.array_equal(kept(logits, top_k, top_p), kept_by_transformers(logits, top_k, top_p))


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 33])
def test_of_equal_tokens_all_are_kept_where_transformers_keeps_one(top_k, top_p):
    # Multiples of log 2 make probabilities whose sums are exact enough for both to agree where a set ends.
    rng = np.random.default_rng(top_k)
    logits = (rng.integers(0, 6, (60, 33)) * np.log(2)).astype(np.float32)
    theirs = kept_by_transformers(logits, top_k, top_p)
    least = np.where(theirs, logits, np.inf).min(-1, keepdims=True)
    assert np.array_equal(kept(logits, top_k, top_p), logits >= least)


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 200_000)).astype(np.float32) * 4
    assert kept(logits, 0, 1.0).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    seeds, positions = np.arange(6) + 7, np.arange(6) * 3
    together = sample(logits, sampling(6, seed=seeds, position=positions))
    alone = [int(sample(logits[i : i + 1], sampling(1, seed=seeds[i], position=positions[i]))[0]) for i in range(6)]
    assert together.tolist() == alone


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = jnp.tile(jnp.asarray([[0.0, 0.1, 0.0]]), (200, 1))
    mixed = sampling(200, position=np.arange(200)).replace(temperature=jnp.asarray([0.0, 1.0] * 100))
    tokens = np.asarray(sample(logits, mixed))
    assert set(tokens[::2]) == {1}
    assert set(tokens[1::2]) == {0, 1, 2}


def packed(allowed):
    """Booleans [rows, vocab] as the mask that the device takes, with every bit beyond the vocabulary set."""
    spare = -allowed.shape[1] % 32
    bits = np.pad(allowed, ((0, 0), (0, spare)), constant_values=True)
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def test_a_mask_forbids_tokens_greedy_and_sampled() -> None:
    allowed = packed(np.asarray([[False, True, True, False]]))
    logits = jnp.asarray([[9.0, 1.0, 2.0, 9.0]])
    assert sample(logits, sampling(1, temperature=0.0, mask=allowed)).tolist() == [2]
    many = sampling(200, position=np.arange(200), mask=np.tile(allowed, (200, 1)))
    assert set(np.asarray(sample(jnp.tile(logits, (200, 1)), many))) == {1, 2}


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_a_masked_row_is_sampled_as_if_the_other_tokens_were_not_there(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(40, vocab)).astype(np.float32)
    allowed = rng.random((40, vocab)) < 0.3
    allowed[np.arange(40), rng.integers(0, vocab, 40)] = True
    gone = jnp.where(allowed, logits, -jnp.inf)
    for options in ({"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.5}):
        options = {"seed": np.arange(40), **options}
        tokens = sample(jnp.asarray(logits), sampling(40, mask=packed(allowed), **options))
        assert allowed[np.arange(40), tokens].all()
        assert tokens.tolist() == sample(gone, sampling(40, **options)).tolist()


def test_top_k_and_top_p_count_allowed_tokens_only() -> None:
    row = np.asarray([[9.0, 8.0, 2.0, 1.0, 0.0]], np.float32)
    mask = packed(np.asarray([[False, False, True, True, True]]))
    logits, mask = jnp.tile(jnp.asarray(row), (300, 1)), np.tile(mask, (300, 1))
    for options in ({"top_k": 2}, {"top_p": 0.9}):
        assert set(np.asarray(sample(logits, sampling(300, position=np.arange(300), mask=mask, **options)))) == {2, 3}


def test_a_mask_of_ones_changes_nothing() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(50, 70)), jnp.float32)
    ones = np.full((50, 3), 0xFFFFFFFF, np.uint32)
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "seed": np.arange(50), "top_p": 0.8}
        with_mask, without = sampling(50, mask=ones, **options), sampling(50, **options)
        assert sample(logits, with_mask).tolist() == sample(logits, without).tolist()


@pytest.mark.parametrize("pick", [ours.greedy, ours.sample])
def test_picking_depends_on_no_condition_on_a_gpu(pick, monkeypatch):
    # Its host would wait for it, and for every step before it, before it could launch another.
    monkeypatch.setattr(ours, "on_cpu", lambda: False)
    rows = sampling(2, mask=np.full((2, 1), 2**32 - 1, np.uint32))
    program = str(jax.make_jaxpr(pick)(jnp.zeros((2, 32)), rows))
    assert "cond[" not in program
    assert "while[" not in program


@pytest.mark.parametrize("temperature", [0.0, 1.0, np.asarray([0.0, 0.7, 0.0, 1.3])])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": np.asarray([0, 3, 1, 0])}])
def test_samples_one_by_one_are_those_of_all_at_once(temperature, limits, monkeypatch):
    logits = jax.random.normal(jax.random.key(3), (4, 200))
    rows = sampling(4, temperature=temperature, seed=np.arange(4), position=np.arange(4), **limits)
    one_by_one = sample(logits, rows).tolist()
    monkeypatch.setattr(ours, "on_cpu", lambda: False)
    assert jax.jit(lambda *each: ours.sample(*each))(logits, rows).tolist() == one_by_one


def test_what_is_greedy_is_what_is_sampled_at_temperature_zero() -> None:
    logits = jax.random.normal(jax.random.key(0), (20, 64))
    rows = sampling(20, temperature=0.0, mask=np.full((20, 2), 0x0F0F0F0F, np.uint32))
    assert greedy(logits, rows).tolist() == sample(logits, rows).tolist()

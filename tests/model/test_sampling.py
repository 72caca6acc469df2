import jax.numpy as jnp
import numpy as np

from model.sampling import Sampling, sample


def sampling(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0, allowed=None):
    return Sampling(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        seeds=jnp.asarray(np.broadcast_to(seed, rows), jnp.uint32),
        positions=jnp.asarray(np.broadcast_to(position, rows), jnp.int32),
        allowed=allowed,
    )


def draws(row, count, **options):
    logits = jnp.tile(jnp.asarray(row, jnp.float32), (count, 1))
    return np.asarray(sample(logits, sampling(count, position=np.arange(count), **options)))


def test_temperature_zero_takes_the_most_likely_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)), jnp.float32)
    assert sample(logits, sampling(5, temperature=0.0)).tolist() == np.argmax(logits, -1).tolist()


def test_draws_follow_the_softmax_distribution():
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draws(np.log(probs), 20_000), minlength=4) / 20_000
    np.testing.assert_allclose(counts, probs, atol=0.015)


def test_top_k_keeps_the_k_most_likely_tokens():
    assert set(draws([1.0, 3.0, 2.0, 0.5], 500, top_k=2)) == {1, 2}
    assert set(draws([1.0, 3.0, 2.0, 0.5], 50, top_k=1)) == {1}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    row = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(row, 500, top_p=0.75)) == {0, 1}
    assert set(draws(row, 500, top_p=0.81)) == {0, 1, 2}
    assert set(draws(row, 50, top_p=0.01)) == {0}


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    seeds, positions = np.arange(6) + 7, np.arange(6) * 3
    together = sample(logits, sampling(6, seed=seeds, position=positions))
    alone = [int(sample(logits[i : i + 1], sampling(1, seed=seeds[i], position=positions[i]))[0]) for i in range(6)]
    assert together.tolist() == alone


def test_greedy_and_sampled_rows_share_a_batch():
    logits = jnp.tile(jnp.asarray([[0.0, 0.1, 0.0]]), (200, 1))
    mixed = sampling(200, position=np.arange(200)).replace(temperature=jnp.asarray([0.0, 1.0] * 100))
    tokens = np.asarray(sample(logits, mixed))
    assert set(tokens[::2]) == {1}
    assert set(tokens[1::2]) == {0, 1, 2}


def test_a_mask_forbids_tokens_greedy_and_sampled():
    allowed = jnp.asarray([[False, True, True, False]])
    logits = jnp.asarray([[9.0, 1.0, 2.0, 9.0]])
    assert sample(logits, sampling(1, temperature=0.0, allowed=allowed)).tolist() == [2]
    many = sampling(200, position=np.arange(200), allowed=jnp.tile(allowed, (200, 1)))
    assert set(np.asarray(sample(jnp.tile(logits, (200, 1)), many))) == {1, 2}

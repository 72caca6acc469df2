import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Batch, locate, paged_attention, reference
from model.kv import KVPool

KV_HEADS, GROUP, HEAD_DIM, LAYERS, PAGE = 2, 3, 16, 2, 16


def ragged(prefixes, chunks, page_size=PAGE, spare_seqs=0, spare_tokens=0, seed=0):
    """A random pool, batch and queries; every slot that no query may see holds NaN."""
    rng = np.random.default_rng(seed)
    lengths = [p + c for p, c in zip(prefixes, chunks, strict=True)]
    pages = [-(-n // page_size) for n in lengths]
    num_pages = sum(pages) + 5
    shuffled = rng.permutation(num_pages)
    shape = (LAYERS, num_pages, KV_HEADS, page_size, HEAD_DIM)
    k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    table = np.zeros((len(chunks) + spare_seqs, max(pages) + 2), np.int32)
    table[:] = shuffled[-1]  # unused entries name a poisoned page
    taken = 0
    for s, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        table[s, :count] = shuffled[taken : taken + count]
        taken += count
        for side in (k, v):
            for i, page in enumerate(table[s, :count]):
                filled = min(page_size, length - i * page_size)
                side[:, page, :, :filled] = rng.normal(size=(LAYERS, KV_HEADS, filled, HEAD_DIM))
    starts = np.full(len(table) + 1, sum(chunks), np.int32)
    starts[: len(chunks) + 1] = np.concatenate([[0], np.cumsum(chunks)])
    tokens = sum(chunks) + spare_tokens
    batch = Batch(
        tokens=jnp.zeros(tokens, jnp.int32),
        starts=jnp.asarray(starts),
        prefix=jnp.asarray(list(prefixes) + [0] * spare_seqs, jnp.int32),
        block_table=jnp.asarray(table),
        rows=jnp.zeros(1, jnp.int32),
        max_chunk=max(chunks),
    )
    q = jnp.asarray(rng.normal(size=(tokens, KV_HEADS, GROUP, HEAD_DIM)), jnp.float32)
    return q, KVPool(k=jnp.asarray(k), v=jnp.asarray(v)), batch


def new_keys_and_values(pool, batch, layer):
    """The new tokens' own keys and values, [tokens, kv_heads, head_dim], as the forward pass has them at hand."""
    _, pages, offsets = locate(batch, pool)
    return (side.at[layer, pages, :, offsets].get(mode="fill", fill_value=0) for side in (pool.k, pool.v))


def assert_matches_reference(q, pool, batch, layer=1):
    real = int(batch.starts[-1])
    expected = np.asarray(reference(q, pool, layer, batch))[:real]
    k, v = new_keys_and_values(pool, batch, layer)
    actual = np.asarray(jax.jit(paged_attention)(q, k, v, pool, layer, batch))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual[:real], expected, atol=2e-5)


@pytest.mark.parametrize("prefix", [0, 1, PAGE - 1, PAGE, PAGE + 1, 700, 2100])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
def test_a_chunk_behind_a_prefix_matches_the_reference(prefix, chunk):
    assert_matches_reference(*ragged([prefix], [chunk]))


def test_a_mixed_batch_with_padding_matches_the_reference():
    assert_matches_reference(*ragged([0, 1, 15, 16, 17, 900], [5, 1, 33, 1, 64, 2], spare_seqs=2, spare_tokens=11))


def test_a_decode_batch_with_empty_rows_matches_the_reference():
    assert_matches_reference(*ragged([3, 1500, 0, 40], [1, 1, 1, 1], spare_seqs=4, spare_tokens=4))


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches_match_the_reference(seed):
    rng = np.random.default_rng(100 + seed)
    count = int(rng.integers(1, 6))
    prefixes = [int(n) for n in rng.integers(0, 400, count)]
    chunks = [int(n) for n in rng.integers(1, 90, count)]
    page_size = int(rng.choice([1, 8, 64]))
    assert_matches_reference(*ragged(prefixes, chunks, page_size, spare_tokens=int(rng.integers(0, 9)), seed=seed))


def test_memory_grows_with_the_chunk_and_not_with_the_prompt_squared():
    def temporary_bytes(prefix):
        q, pool, batch = ragged([prefix], [256])
        k, v = new_keys_and_values(pool, batch, 0)
        return jax.jit(paged_attention).lower(q, k, v, pool, 0, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16_000) <= 1.1 * temporary_bytes(4_000)

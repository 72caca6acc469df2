"""Both CPU paths of attention against the reference, over ragged batches."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from model.attention import paged_attention
from model.batch import NO_WINDOW, locate
from model.kernels.cpu import build
from model.kernels.reference import reference as in_jax
from tests.helpers import batches
from tests.helpers.attention_oracle import attention as reference

PAGE = 16
ragged = partial(batches.ragged, kv_heads=2, group=3, head_dim=16, page=PAGE, dtype=jnp.float32)


@pytest.fixture(params=["CPU kernel", "blockwise"], autouse=True)
def path(request, monkeypatch):
    """Which of the two paths computes; without a C++ compiler there is only one."""
    if request.param == "blockwise":
        monkeypatch.setattr("model.attention.kernel_for", lambda *_: None)
    elif not build.available():
        pytest.skip("the CPU kernel cannot be built here: its log line says why")
    return request.param


def new_keys_and_values(pool, batch, layer):
    """The new tokens' own keys and values, [tokens, kv_heads, head_dim], as the forward pass has them at hand."""
    _, pages, offsets = locate(batch, pool)
    return (side.at[layer, pages, :, offsets].get(mode="fill", fill_value=0) for side in (pool.k, pool.v))


def jitted(**options):
    """`paged_attention`, compiled anew: JAX would take the program of the same function, whatever path it was."""
    return jax.jit(lambda *args: paged_attention(*args), **options)


def assert_matches_reference(q, pool, batch, layer=1, windows=(None,), sinks=None, compute=None):
    """For each window, with NaN in all pages that none of its queries sees."""
    real, compute = int(batch.starts[-1]), compute or jitted()
    k, v = new_keys_and_values(pool, batch, layer)
    for window in windows:
        expected = np.asarray(reference(q, pool, layer, batch, window, sinks))[:real]
        given = pool if window is None else batches.without_unseen_pages(pool, batch, window)
        actual = np.asarray(compute(q, k, v, given, layer, batch, window, sinks))
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(actual[:real], expected, atol=2e-5, err_msg=f"window {window}")


@pytest.mark.parametrize("prefix", [0, 1, PAGE - 1, PAGE, PAGE + 1, 700, 2100])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
def test_a_chunk_behind_a_prefix_matches_the_reference(prefix, chunk):
    assert_matches_reference(*ragged([prefix], [chunk]))


def test_a_mixed_batch_with_padding_matches_the_reference() -> None:
    assert_matches_reference(*ragged([0, 1, 15, 16, 17, 900], [5, 1, 33, 1, 64, 2], spare_seqs=2, spare_tokens=11))


@pytest.mark.parametrize(("prefixes", "chunks", "spare"), [([700, 3, 16, 900], [33, 1, 1, 1], 4), ([0, 40], [5, 1], 0)])
def test_a_chunk_and_single_tokens_in_one_batch_match_the_reference(prefixes, chunks, spare):
    q, pool, batch = ragged(prefixes, chunks, spare_seqs=spare, spare_tokens=spare)
    assert_matches_reference(q, pool, batch.replace(decode_seqs=len(chunks) - 1 + spare, max_chunk=64))


def test_a_decode_batch_with_empty_rows_matches_the_reference() -> None:
    assert_matches_reference(*ragged([3, 1500, 0, 40], [1, 1, 1, 1], spare_seqs=4, spare_tokens=4))


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches_match_the_reference(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    count = int(rng.integers(1, 6))
    prefixes = [int(n) for n in rng.integers(0, 400, count)]
    chunks = [int(n) for n in rng.integers(1, 90, count)]
    page = int(rng.choice([1, 8, 64]))
    assert_matches_reference(*ragged(prefixes, chunks, page=page, spare_tokens=int(rng.integers(0, 9)), seed=seed))


# One key, a part of a page, a page, across pages and blocks, and more than any sequence has.
WINDOWS = (1, 7, PAGE, 300, 100_000, NO_WINDOW)
SINKS = np.random.default_rng(7).normal(size=(2, 3), scale=3).astype(np.float32)


@pytest.mark.parametrize(
    ("prefixes", "chunks"),
    [
        ([0], [40]),
        ([0], [1024]),
        ([2100], [1]),
        ([2100], [33]),
        ([77], [700]),
        ([0, 1, 15, 16, 17, 900], [5, 1, 33, 1, 64, 2]),
        ([2000, 3, 1500, 40], [1, 1, 1, 1]),
    ],
)
def test_windows_and_sinks_match_the_reference(prefixes, chunks):
    batch = ragged(prefixes, chunks, spare_seqs=1, spare_tokens=3)
    assert_matches_reference(*batch, windows=WINDOWS, sinks=SINKS)


def test_windows_without_sinks_match_the_reference() -> None:
    assert_matches_reference(*ragged([0, 700, 3], [5, 1, 33], spare_seqs=1, spare_tokens=2), windows=WINDOWS)


def test_sinks_without_a_window_match_the_reference() -> None:
    assert_matches_reference(*ragged([0, 700, 3], [5, 1, 33], spare_seqs=1, spare_tokens=2), sinks=SINKS)


@pytest.mark.parametrize("window", [9, 200, NO_WINDOW])
def test_a_window_that_is_known_when_compiling_matches_the_reference(window):
    q, pool, batch = ragged([700, 3, 16, 900], [33, 1, 1, 1], spare_seqs=4, spare_tokens=4)
    batch = batch.replace(decode_seqs=7, max_chunk=64)
    assert_matches_reference(q, pool, batch, windows=[window], sinks=SINKS, compute=jitted(static_argnums=6))


def test_a_window_sees_the_keys_that_transformers_masks_let_through() -> None:
    mask = sliding_window_causal_mask_function(7)
    q, pool, batch = ragged([30], [50])
    expected = [[bool(mask(0, 0, torch.tensor(30 + i), torch.tensor(key))) for key in range(80)] for i in range(50)]
    plain, seen = reference(q, pool, 1, batch, 7), []
    for key in range(80):
        v = pool.v.at[1, batch.block_table[0, key // PAGE], :, key % PAGE].set(1e6)
        seen.append((reference(q, replace(pool, v=v), 1, batch, 7) != plain).any((1, 2, 3)))
    assert np.array_equal(np.stack(seen, axis=1), expected)


@pytest.mark.parametrize(("window", "sinks"), [(None, None), (7, None), (300, SINKS)])
def test_the_kernels_own_reference_agrees(window, sinks):
    q, pool, batch = ragged([3, 700, 0], [5, 1, 33], spare_seqs=1, spare_tokens=2)
    sinks = None if sinks is None else jnp.asarray(sinks)
    found = np.asarray(in_jax(q, pool, 1, batch, window, sinks))[:39]
    np.testing.assert_allclose(found, reference(q, pool, 1, batch, window, sinks)[:39], atol=2e-6)


def test_memory_grows_with_the_chunk_and_not_with_the_prompt_squared() -> None:
    def temporary_bytes(prefix):
        q, pool, batch = ragged([prefix], [256])
        k, v = new_keys_and_values(pool, batch, 0)
        return jitted().lower(q, k, v, pool, 0, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16_000) <= 1.1 * temporary_bytes(4_000)

"""Ragged batches over a poisoned pool: what all paths of attention are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from model.batch import Batch
from model.kv import KVPool

LAYERS = 2


def ragged(
    prefixes: Sequence[int],
    chunks: Sequence[int],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    dtype: jnp.dtype,
    spare_seqs: int = 0,
    spare_tokens: int = 0,
    seed: int = 0,
) -> tuple[jax.Array, KVPool, Batch]:
    """Random queries, pool and batch, the pages in shuffled order; every slot that no query may see holds NaN."""
    rng = np.random.default_rng(seed)
    lengths = [p + c for p, c in zip(prefixes, chunks, strict=True)]
    counts = [-(-length // page) for length in lengths]
    shuffled = rng.permutation(sum(counts) + 5)
    shape = (LAYERS, len(shuffled), kv_heads, page, head_dim)
    k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    # Entries that no sequence uses name a poisoned page.
    table = np.full((len(chunks) + spare_seqs, max(counts) + 2), shuffled[-1], np.int32)
    ends = np.cumsum(counts)
    for s, (length, count, end) in enumerate(zip(lengths, counts, ends, strict=True)):
        table[s, :count] = shuffled[end - count : end]
        for i, number in enumerate(table[s, :count]):
            filled = min(page, length - i * page)
            for side in (k, v):
                side[:, number, :, :filled] = rng.normal(size=(LAYERS, kv_heads, filled, head_dim))
    starts = np.full(len(table) + 1, sum(chunks), np.int32)
    starts[: len(chunks) + 1] = np.concatenate([[0], np.cumsum(chunks)])
    tokens = sum(chunks) + spare_tokens
    batch = Batch(
        tokens=jnp.zeros(tokens, jnp.int32),
        starts=jnp.asarray(starts),
        prefix=jnp.asarray([*prefixes, *[0] * spare_seqs], jnp.int32),
        block_table=jnp.asarray(table),
        logit_indices=jnp.zeros(1, jnp.int32),
        max_chunk=max(chunks),
    )
    q = jnp.asarray(rng.normal(size=(tokens, kv_heads, group, head_dim)), dtype)
    return q, KVPool(k=jnp.asarray(k, dtype), v=jnp.asarray(v, dtype)), batch


def without_unseen_pages(pool: KVPool, batch: Batch, window: int) -> KVPool:
    """The pool with NaN in all pages that lie before the window of their sequence's first new token."""
    unseen = [
        int(page)
        for prefix, pages in zip(np.asarray(batch.prefix).tolist(), np.asarray(batch.block_table), strict=True)
        for page in pages[: max(prefix - window + 1, 0) // pool.page_size]
    ]
    return replace(pool, k=pool.k.at[:, unseen].set(jnp.nan), v=pool.v.at[:, unseen].set(jnp.nan))

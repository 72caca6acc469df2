"""Attention over the paged pool in XLA: the blockwise path, which runs everywhere.

Keys are gathered from the pool a block of pages at a time, so memory grows with the chunk, not with the square of the
prompt: FlashAttention's algorithm 1 (Dao et al., 2022, https://arxiv.org/abs/2205.14135) with the online softmax of
Milakov and Gimelshein, 2018 (https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from model.batch import MASKED, NO_WINDOW, Array, Batch, Sinks, Window, by_sequence, by_token
from model.kv import KVPool
from model.kv_rows import decode, encode

# Keys of the prefix in a block with a mask: half of such a block, on average, is wasted.
MASKED_BLOCK = 256
# Queries that attend to their own chunk together: longer runs mask more, shorter ones make smaller matmuls.
SELF_BLOCK = 256


class Softmax(NamedTuple):
    """An online softmax over the keys seen so far, by query row."""

    total: Float32[jax.Array, "seqs kv_heads query_rows head_dim"]  # values weighted by exp(score - peak)
    peak: Float32[jax.Array, "seqs kv_heads query_rows"]  # largest score
    weight: Float32[jax.Array, "seqs kv_heads query_rows"]  # sum of exp(score - peak)


def blockwise(
    q: Float[jax.Array, "tokens kv_heads group head_dim"],
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    v: Float[jax.Array, "tokens kv_heads head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    window: Window = None,
    sinks: Sinks = None,
) -> Float[jax.Array, "tokens kv_heads group head_dim"]:
    """The XLA path of `paged_attention`: same arguments, same result.

    The chunk attends to its own keys `k` first, as the pool holds them, then to the pages of its prefix.
    """
    tokens, kv_heads, group, head_dim = q.shape
    seqs, chunk = batch.prefix.shape[0], batch.max_chunk
    # Query rows are ordered by position, then head of the group, so the queries from any position on are one slice.
    queries = jnp.einsum("sqkgd->skqgd", by_sequence(q * head_dim**-0.5, batch))
    queries = queries.reshape(seqs, kv_heads, chunk * group, head_dim)
    own = (decode(encode(x, pool.k.dtype), q.dtype) for x in (k, v))
    keys, values = (jnp.einsum("sckd->skcd", by_sequence(x, batch)) for x in own)

    # A window as long as the block table masks nothing, so layers without one lose no time beside others in a scan.
    window = NO_WINDOW if window is None else window
    masks = window < batch.block_table.shape[1] * pool.page_size
    in_window = partial(attend_in_window, window=window)
    computed = queries, keys, values, pool, layer, batch
    if isinstance(masks, jax.Array):
        state = jax.lax.cond(masks, in_window, attend, *computed)
    else:
        state = in_window(*computed) if masks else attend(*computed)
    if sinks is not None:
        state = with_sinks(state, jnp.tile(sinks, (1, chunk)))
    result = (state.total / state.weight[..., None]).astype(q.dtype).reshape(seqs, kv_heads, chunk, group, head_dim)
    return by_token(jnp.einsum("skqgd->sqkgd", result), batch, tokens)


def attend(
    queries: Float[jax.Array, "seqs kv_heads query_rows head_dim"],
    keys: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    values: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
) -> Softmax:
    """Causal attention of chunks over themselves and their prefixes."""
    seqs, kv_heads, chunk, head_dim = keys.shape
    narrow = -(-MASKED_BLOCK // pool.page_size)  # pages in a block with a mask
    wide = narrow * max(1, whole_block_size(seqs, chunk) // MASKED_BLOCK)  # pages in a block without
    table = in_blocks(batch.block_table, wide)
    heads = jnp.arange(kv_heads)[:, None]  # [kv_heads, 1], against pages [seqs, 1, pages]

    def cached(first: jax.Array, pages: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values in `pages` pages of every sequence, each [seqs, kv_heads, slots, head_dim]."""
        ids = jax.lax.dynamic_slice(table, (0, first), (seqs, pages))[:, None]
        # Gathered head by head, so that the tiles land in the order of the matmul and no transpose copies them;
        # without bounds checks, since a block table names pages of the pool.
        tiles = (side.at[layer, ids, heads].get(mode="promise_in_bounds") for side in (pool.k, pool.v))
        keys, values = (decode(tile, queries.dtype).reshape(seqs, kv_heads, -1, head_dim) for tile in tiles)
        return keys, values

    def whole_block(b: jax.Array, state: Softmax) -> Softmax:
        keys, values = cached(b * wide, wide)
        return accumulate(state, score(queries, keys), values)

    def masked_block(b: jax.Array, state: Softmax) -> Softmax:
        keys, values = cached(b * narrow, narrow)
        slots = b * narrow * pool.page_size + jnp.arange(keys.shape[2])
        filled = (slots < batch.prefix[:, None])[:, None, :]  # [seqs, 1, slots]
        scores = jnp.where(filled[:, :, None], score(queries, keys), MASKED)
        # A slot after the prefix has probability 0, but it may hold NaN and 0 x NaN is NaN: keep it out of the product.
        return accumulate(state, scores, jnp.where(filled[..., None], values, 0))

    # Blocks that every sequence (except empty ones) sees whole need no mask.
    longest = jnp.max(batch.prefix)
    whole = jnp.min(jnp.where(batch.lengths > 0, batch.prefix, longest)) // (wide * pool.page_size)
    state = attend_to_chunk(queries, keys, values)
    state = jax.lax.fori_loop(0, whole, whole_block, state)
    blocks = (longest + narrow * pool.page_size - 1) // (narrow * pool.page_size)
    return Softmax(*jax.lax.fori_loop(whole * (wide // narrow), blocks, masked_block, state))


def attend_in_window(
    queries: Float[jax.Array, "seqs kv_heads query_rows head_dim"],
    keys: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    values: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    window: Int32[jax.Array, ""] | int,
) -> Softmax:
    """Likewise, each query over the last `window` keys up to itself; blocks that no query sees are not read.

    Each sequence begins at its own first block, so a long one costs no more than a short one.
    """
    seqs, kv_heads, chunk, head_dim = keys.shape
    table = jnp.asarray(batch.block_table)
    pages = -(-MASKED_BLOCK // pool.page_size)  # in a block
    block = pages * pool.page_size
    heads = jnp.arange(kv_heads)[:, None]  # [kv_heads, 1], against pages [seqs, 1, pages]
    prefix = jnp.asarray(batch.prefix)[:, None]  # [seqs, 1]
    oldest = jnp.maximum(prefix - window + 1, 0)  # the first key that a query of the sequence sees
    positions = prefix + jnp.repeat(jnp.arange(chunk), queries.shape[2] // chunk)  # [seqs, query_rows]

    def masked_block(b: jax.Array, state: Softmax) -> Softmax:
        first = oldest // block + b  # [seqs, 1]: the block of each sequence
        ids = jnp.take_along_axis(table, first * pages + jnp.arange(pages), axis=1, mode="clip")
        tiles = (side.at[layer, ids[:, None], heads].get(mode="clip") for side in (pool.k, pool.v))
        keys, values = (decode(tile, queries.dtype).reshape(seqs, kv_heads, -1, head_dim) for tile in tiles)
        slots = first * block + jnp.arange(block)  # [seqs, slots]
        seen = (slots < prefix)[:, None] & (slots[:, None] > positions[..., None] - window)  # [seqs, query_rows, slots]
        scores = jnp.where(seen[:, None], score(queries, keys), MASKED)
        # What no query sees may be NaN: as in `attend`.
        kept = (slots >= oldest) & (slots < prefix)
        return accumulate(state, scores, jnp.where(kept[:, None, :, None], values, 0))

    state = attend_to_chunk(queries, keys, values, window)
    blocks = jnp.max(-(-prefix // block) - oldest // block)
    return Softmax(*jax.lax.fori_loop(0, blocks, masked_block, state))


def whole_block_size(seqs: int, chunk: int) -> int:
    """Keys of the prefix in a block without a mask, for each sequence.

    Measured on CPU: scores of long chunks should stay in cache, short chunks and small batches should take few steps.
    """
    return 512 if chunk >= 1024 else 1024 if chunk > 1 else max(MASKED_BLOCK, 2048 // seqs)


def attend_to_chunk(
    queries: Float[jax.Array, "seqs kv_heads query_rows head_dim"],
    keys: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    values: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    window: Int32[jax.Array, ""] | int | None = None,
) -> Softmax:
    """Causal attention of a chunk over itself, one run of queries at a time; query_rows is chunk * group.

    Keys after the run are left out, and without a window only the run's own keys are masked: a mask over all keys
    doubles the time on CPU.
    """
    chunk, runs = keys.shape[2], []
    group = queries.shape[2] // chunk
    for start in range(0, chunk, SELF_BLOCK):
        stop = min(start + SELF_BLOCK, chunk)
        run = queries[:, :, start * group : stop * group]
        query = np.repeat(np.arange(stop - start), group)[:, None]  # [query_rows, 1], counted from the run's first
        seen = np.arange(stop - start) <= query  # [query_rows, keys]
        if window is not None:
            seen = seen & (np.arange(stop - start) > query - window)
        scores = jnp.where(seen, score(run, keys[:, :, start:stop]), MASKED)
        peak = scores.max(-1)
        probs = jnp.exp(scores - peak[..., None])
        state = Softmax(weigh(probs, values[:, :, start:stop]), peak, probs.sum(-1))
        if start and window is not None:
            first = jnp.maximum(start - window + 1, 0) // SELF_BLOCK
            block = partial(self_block, run, keys, values, query + start, window)
            state = jax.lax.fori_loop(first, start // SELF_BLOCK, block, state)
        elif start:
            state = accumulate(state, score(run, keys[:, :, :start]), values[:, :, :start])
        runs.append(state)
    return Softmax(*(jnp.concatenate(fields, axis=2) for fields in zip(*runs, strict=True)))


def self_block(
    run: Float[jax.Array, "seqs kv_heads query_rows head_dim"],
    keys: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    values: Float[jax.Array, "seqs kv_heads chunk head_dim"],
    query: np.ndarray,  # [query_rows, 1], the place of each row in the chunk
    window: Int32[jax.Array, ""] | int,
    b: jax.Array,
    state: Softmax,
) -> Softmax:
    """The softmax of a run of queries with block `b` of their chunk, in which each sees the keys of its window."""
    keys, values = (jax.lax.dynamic_slice_in_dim(x, b * SELF_BLOCK, SELF_BLOCK, axis=2) for x in (keys, values))
    seen = b * SELF_BLOCK + np.arange(SELF_BLOCK) > query - window
    return accumulate(state, jnp.where(seen, score(run, keys), MASKED), values)


def with_sinks(state: Softmax, sinks: Float32[jax.Array, "kv_heads query_rows"]) -> Softmax:
    """The softmax with one more logit for each query row, which has no value."""
    peak = jnp.maximum(state.peak, sinks)
    decay = jnp.exp(state.peak - peak)
    return Softmax(state.total * decay[..., None], peak, state.weight * decay + jnp.exp(sinks - peak))


def accumulate(
    state: Softmax,
    scores: Float32[jax.Array, "seqs kv_heads query_rows keys"],
    values: Float[jax.Array, "seqs kv_heads keys head_dim"],
) -> Softmax:
    """The softmax with one more block of keys."""
    peak = jnp.maximum(state.peak, scores.max(-1))
    probs = jnp.exp(scores - peak[..., None])
    decay = jnp.exp(state.peak - peak)
    return Softmax(
        total=state.total * decay[..., None] + weigh(probs, values),
        peak=peak,
        weight=state.weight * decay + probs.sum(-1),
    )


def score(
    queries: Float[jax.Array, "seqs kv_heads query_rows head_dim"],
    keys: Float[jax.Array, "seqs kv_heads keys head_dim"],
) -> Float32[jax.Array, "seqs kv_heads query_rows keys"]:
    """Products of queries and keys, in float32."""
    return jnp.einsum("skqd,skcd->skqc", queries, keys, preferred_element_type=jnp.float32)


def weigh(
    probs: Float32[jax.Array, "seqs kv_heads query_rows keys"],
    values: Float[jax.Array, "seqs kv_heads keys head_dim"],
) -> Float32[jax.Array, "seqs kv_heads query_rows head_dim"]:
    """Values weighted by probabilities, in float32."""
    return jnp.einsum("skqc,skcd->skqd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)


def in_blocks(table: Int32[Array, "seqs pages"], pages: int) -> Int32[Array, "seqs padded"]:
    """The block table padded with page 0 to whole blocks of `pages`, and one more; that padding is always masked.

    Without the extra block, the slice of a table of one block would not depend on the loop, and XLA would gather it
    before every loop.
    """
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages + pages)))

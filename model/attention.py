"""Attention of new tokens over the paged KV pool: one entry point, and the blockwise path that runs everywhere.

The blockwise path is FlashAttention's online softmax (Dao et al., 2022, algorithm 1) written for XLA: keys are gathered
from the pool a block of pages at a time, so memory grows with the chunk and never with the square of the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from model.kv import KVPool

# A batch is packed on the host and read on the device.
Array = jax.Array | np.ndarray

# Finite, so that no difference of two of them is NaN.
MASKED = -1e30
# Keys of the prefix in a block with a mask: half of one, on average, is computed in vain.
MASKED_BLOCK = 256
# Queries that attend to their own chunk together: longer runs mask more in vain, shorter ones make smaller matmuls.
SELF_BLOCK = 256


@struct.dataclass
class Batch:
    """A ragged batch: the new tokens of several sequences, back to back, each behind its own cached prefix.

    Sequences beyond the real ones are empty (equal starts), tokens beyond the last start are padding. Prefill chunks
    and decode tokens can share a batch: the former come first, and `singles` counts the latter.
    """

    tokens: Array  # [tokens] int32
    starts: Array  # [seqs + 1] int32: sequence s owns tokens starts[s]:starts[s + 1]
    prefix: Array  # [seqs] int32: tokens of the sequence that are in the pool already
    block_table: Array  # [seqs, pages] int32: the sequence's pages in order of position
    rows: Array  # [rows] int32: the tokens whose logits are wanted
    max_chunk: int = struct.field(pytree_node=False)  # no sequence has more new tokens than this
    singles: int = struct.field(pytree_node=False, default=0)  # the last so many sequences have at most one new token

    @property
    def lengths(self) -> Array:
        """New tokens of each sequence, [seqs] int32."""
        return self.starts[1:] - self.starts[:-1]


def locate(batch: Batch, pool: KVPool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Position, page and offset of every token in the batch, each [tokens] int32; padding gets an out-of-range page."""
    rows = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    seqs = jnp.searchsorted(batch.starts, rows, side="right").astype(jnp.int32) - 1
    seqs = jnp.clip(seqs, 0, batch.prefix.shape[0] - 1)
    positions = batch.prefix[seqs] + rows - batch.starts[seqs]
    pages = batch.block_table[seqs, positions // pool.page_size]
    real = rows < batch.starts[-1]
    return jnp.where(real, positions, 0), jnp.where(real, pages, pool.num_pages), positions % pool.page_size


def paged_attention(
    q: jax.Array,  # [tokens, kv_heads, group, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
) -> jax.Array:
    """Causal attention of each new token over its sequence's cached prefix and the new tokens up to itself.

    Query i of a chunk behind a prefix of p tokens sees positions 0 to p + i; the result is shaped like `q`. The new
    keys and values must be in the pool already. Softmax and accumulation are in float32, scores are scaled by
    head_dim ** -0.5.
    """
    from model.kernels.dispatch import kernel_for  # late: the kernels build on this module

    if kernel := kernel_for(q, pool, batch):
        return kernel(q, pool, layer, batch)
    if batch.singles:
        chunks, singles = apart(batch)
        first, second = (paged_attention(q, k, v, pool, layer, part) for part in (chunks, singles))
        in_chunk = jnp.arange(q.shape[0]) < chunks.starts[-1]
        return jnp.where(in_chunk[:, None, None, None], first, second)
    return blockwise(q, k, v, pool, layer, batch)


def apart(batch: Batch) -> tuple[Batch, Batch]:
    """A batch's sequences of chunks and its sequences of single tokens; both know their tokens in the whole batch."""
    cut = batch.prefix.shape[0] - batch.singles
    first, last = (
        replace(
            batch,
            starts=batch.starts[part.start : part.stop + 1],
            prefix=batch.prefix[part],
            block_table=batch.block_table[part],
            max_chunk=chunk,
            singles=0,
        )
        for part, chunk in ((slice(0, cut), batch.max_chunk), (slice(cut, cut + batch.singles), 1))
    )
    return first, last


class Softmax(NamedTuple):
    """An online softmax over the keys seen so far, by row of queries."""

    total: jax.Array  # [seqs, kv_heads, rows, head_dim] float32: values weighted by exp(score - peak)
    peak: jax.Array  # [seqs, kv_heads, rows] float32: largest score
    weight: jax.Array  # [seqs, kv_heads, rows] float32: sum of exp(score - peak)


def blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, layer: jax.Array | int, batch: Batch
) -> jax.Array:
    """The XLA path of `paged_attention`; same arguments, same result.

    The chunk attends to itself first, from the new keys at hand, then to the pages of its prefix.
    """
    tokens, kv_heads, group, head_dim = q.shape
    seqs, chunk = batch.prefix.shape[0], batch.max_chunk
    # Rows of queries are ordered by position, then head of the group: the queries from any position on are one slice.
    queries = jnp.einsum("sqkgd->skqgd", by_sequence(q * head_dim**-0.5, batch))
    queries = queries.reshape(seqs, kv_heads, chunk * group, head_dim)
    keys, values = (jnp.einsum("sckd->skcd", by_sequence(x.astype(pool.k.dtype), batch)) for x in (k, v))

    narrow = -(-MASKED_BLOCK // pool.page_size)  # pages in a block with a mask
    wide = narrow * max(1, whole_block_size(seqs, chunk) // MASKED_BLOCK)  # pages in a block without
    table = in_blocks(batch.block_table, wide)
    heads = jnp.arange(kv_heads)[:, None]  # [kv_heads, 1], against pages [seqs, 1, pages]

    def cached(first: jax.Array, pages: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of `pages` pages of every sequence, each [seqs, kv_heads, slots, head_dim]."""
        ids = jax.lax.dynamic_slice(table, (0, first), (seqs, pages))[:, None]
        # Gathered head by head, so that the tiles land in the order of the matmul and no transpose copies them;
        # without bounds checks, since a block table names pages of the pool.
        tiles = (side.at[layer, ids, heads].get(mode="promise_in_bounds") for side in (pool.k, pool.v))
        keys, values = (tile.reshape(seqs, kv_heads, -1, head_dim) for tile in tiles)
        return keys, values

    def whole_block(b: jax.Array, state: Softmax) -> Softmax:
        keys, values = cached(b * wide, wide)
        return accumulate(state, score(queries, keys), values)

    def masked_block(b: jax.Array, state: Softmax) -> Softmax:
        keys, values = cached(b * narrow, narrow)
        slots = b * narrow * pool.page_size + jnp.arange(keys.shape[2])
        filled = (slots < batch.prefix[:, None])[:, None, :]  # [seqs, 1, slots]
        scores = jnp.where(filled[:, :, None], score(queries, keys), MASKED)
        # A slot behind the prefix has probability 0, but 0 x NaN is NaN: what lies there must not reach the product.
        return accumulate(state, scores, jnp.where(filled[..., None], values, 0))

    # Blocks that every sequence sees whole need no mask; empty sequences have no say.
    longest = jnp.max(batch.prefix)
    whole = jnp.min(jnp.where(batch.lengths > 0, batch.prefix, longest)) // (wide * pool.page_size)
    state = attend_to_chunk(queries, keys, values, group)
    state = jax.lax.fori_loop(0, whole, whole_block, state)
    blocks = (longest + narrow * pool.page_size - 1) // (narrow * pool.page_size)
    state = jax.lax.fori_loop(whole * (wide // narrow), blocks, masked_block, state)
    result = (state.total / state.weight[..., None]).astype(q.dtype).reshape(seqs, kv_heads, chunk, group, head_dim)
    return by_token(jnp.einsum("skqgd->sqkgd", result), batch, tokens)


def whole_block_size(seqs: int, chunk: int) -> int:
    """Keys of the prefix that each sequence attends to at a time where no mask is needed.

    Measured on CPU: scores of long chunks should stay in cache, short chunks and small batches should take few steps.
    """
    return 512 if chunk >= 1024 else 1024 if chunk > 1 else max(MASKED_BLOCK, 2048 // seqs)


def attend_to_chunk(
    queries: jax.Array,  # [seqs, kv_heads, chunk * group, head_dim]
    keys: jax.Array,  # [seqs, kv_heads, chunk, head_dim]
    values: jax.Array,  # [seqs, kv_heads, chunk, head_dim]
    group: int,
) -> Softmax:
    """Causal attention of a chunk over itself, run by run of its queries.

    Keys that none of a run sees are left out; only the keys of the run itself are masked, since a mask over all of them
    doubles the time on CPU.
    """
    chunk, runs = keys.shape[2], []
    for start in range(0, chunk, SELF_BLOCK):
        stop = min(start + SELF_BLOCK, chunk)
        rows = queries[:, :, start * group : stop * group]
        seen = np.arange(stop - start) <= np.repeat(np.arange(stop - start), group)[:, None]  # [rows, keys]
        scores = jnp.where(seen, score(rows, keys[:, :, start:stop]), MASKED)
        peak = scores.max(-1)
        probs = jnp.exp(scores - peak[..., None])
        state = Softmax(weigh(probs, values[:, :, start:stop]), peak, probs.sum(-1))
        if start:
            state = accumulate(state, score(rows, keys[:, :, :start]), values[:, :, :start])
        runs.append(state)
    return Softmax(*(jnp.concatenate(parts, axis=2) for parts in zip(*runs, strict=True)))


def accumulate(state: Softmax, scores: jax.Array, values: jax.Array) -> Softmax:
    """The softmax with one more block of keys, scored [seqs, kv_heads, rows, keys], and their values."""
    peak = jnp.maximum(state.peak, scores.max(-1))
    probs = jnp.exp(scores - peak[..., None])
    decay = jnp.exp(state.peak - peak)
    return Softmax(
        total=state.total * decay[..., None] + weigh(probs, values),
        peak=peak,
        weight=state.weight * decay + probs.sum(-1),
    )


def score(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores [seqs, kv_heads, rows, keys] in float32."""
    return jnp.einsum("skqd,skcd->skqc", queries, keys, preferred_element_type=jnp.float32)


def weigh(probs: jax.Array, values: jax.Array) -> jax.Array:
    """Values weighted by probabilities, [seqs, kv_heads, rows, head_dim] in float32."""
    return jnp.einsum("skqc,skcd->skqd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)


def reference(q: jax.Array, pool: KVPool, layer: int, batch: Batch) -> jax.Array:
    """What `paged_attention` must compute, one sequence at a time in float32, with no thought of speed or memory."""
    kv_heads, head_dim = q.shape[1], q.shape[3]
    result = jnp.zeros(q.shape, jnp.float32)
    for s in range(batch.prefix.shape[0]):
        start, stop, prefix = int(batch.starts[s]), int(batch.starts[s + 1]), int(batch.prefix[s])
        length = prefix + stop - start
        pages = batch.block_table[s, : -(-length // pool.page_size)]
        k, v = (
            jnp.einsum("bkpd->bpkd", side[layer, pages]).reshape(-1, kv_heads, head_dim)[:length].astype(jnp.float32)
            for side in (pool.k, pool.v)
        )
        scores = jnp.einsum("qkgd,ckd->kgqc", q[start:stop].astype(jnp.float32), k) * head_dim**-0.5
        seen = jnp.arange(length) <= prefix + jnp.arange(stop - start)[:, None]
        probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        result = result.at[start:stop].set(jnp.einsum("kgqc,ckd->qkgd", probs, v))
    return result.astype(q.dtype)


def by_sequence(q: jax.Array, batch: Batch) -> jax.Array:
    """[tokens, ...] to [seqs, max_chunk, ...]; rows past a sequence's end are for the caller to ignore."""
    seqs, chunk = batch.prefix.shape[0], batch.max_chunk
    if seqs == 1 and chunk == q.shape[0]:
        return q[None]
    rows = jnp.clip(batch.starts[:-1, None] + jnp.arange(chunk), 0, q.shape[0] - 1)
    return q[rows]


def by_token(x: jax.Array, batch: Batch, tokens: int) -> jax.Array:
    """[seqs, max_chunk, ...] back to [tokens, ...]; padding rows hold anything finite."""
    seqs, chunk = x.shape[:2]
    if seqs == 1 and chunk == tokens:
        return x[0]
    rows = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.clip(jnp.searchsorted(batch.starts, rows, side="right") - 1, 0, seqs - 1)
    return x[seq, jnp.clip(rows - batch.starts[seq], 0, chunk - 1)]


def in_blocks(table: Array, pages: int) -> Array:
    """Widen a block table to whole blocks of `pages`, and one more, with page 0; those slots are always masked.

    In a table of one block the slice would not depend on the loop, and XLA would gather it ahead of every loop.
    """
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages + pages)))

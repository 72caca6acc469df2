"""Attention of new tokens over the paged KV pool: one entry point, and the blockwise path that runs everywhere.

The blockwise path is FlashAttention's online softmax (Dao et al., 2022, algorithm 1) written for XLA: keys are gathered
from the pool a block of pages at a time, so memory grows with the chunk and never with the square of the prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from model.kv import KVPool

# A batch is packed on the host and read on the device.
Array = jax.Array | np.ndarray

# Finite, so that a row which sees no key yet gives exp(0) and not exp(nan).
MASKED = -1e30


@struct.dataclass
class Batch:
    """A ragged batch: the new tokens of several sequences, back to back, each behind its own cached prefix.

    Sequences beyond the real ones are empty (equal starts), tokens beyond the last start are padding.
    """

    tokens: Array  # [tokens] int32
    starts: Array  # [seqs + 1] int32: sequence s owns tokens starts[s]:starts[s + 1]
    prefix: Array  # [seqs] int32: tokens of the sequence that are in the pool already
    block_table: Array  # [seqs, pages] int32: the sequence's pages in order of position
    rows: Array  # [rows] int32: the tokens whose logits are wanted
    max_chunk: int = struct.field(pytree_node=False)  # no sequence has more new tokens than this

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
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
) -> jax.Array:
    """Causal attention of each new token over its sequence's pages, the token's own included; shaped like `q`.

    Query i of a chunk behind a prefix of p tokens sees positions 0 to p + i. The new keys must be in the pool already.
    Softmax and accumulation are in float32, scores are scaled by head_dim ** -0.5.
    """
    return blockwise(q, pool, layer, batch)


def blockwise(q: jax.Array, pool: KVPool, layer: jax.Array | int, batch: Batch) -> jax.Array:
    """The XLA path of `paged_attention`; same arguments, same result."""
    tokens, kv_heads, group, head_dim = q.shape
    seqs, chunk = batch.prefix.shape[0], batch.max_chunk
    # Measured on CPU: long chunks want small blocks (scores stay in cache), short ones large blocks (fewer steps).
    block = min(512 if chunk >= 1024 else 1024, batch.block_table.shape[1] * pool.page_size)
    pages_per_block = max(1, block // pool.page_size)
    block = pages_per_block * pool.page_size
    table = pad_to_multiple(batch.block_table, pages_per_block)

    queries = by_sequence(q, batch)  # [seqs, chunk, kv_heads, group, head_dim]
    queries = jnp.einsum("sqkgd->skgqd", queries * head_dim**-0.5).reshape(seqs, kv_heads, group * chunk, head_dim)
    positions = batch.prefix[:, None] + jnp.arange(chunk, dtype=jnp.int32)  # [seqs, chunk]
    positions = jnp.tile(positions, (1, group))[:, None, :, None]  # [seqs, 1, group * chunk, 1]
    lengths = batch.prefix + batch.lengths
    heads = jnp.arange(kv_heads)[:, None]  # [kv_heads, 1], against pages [seqs, 1, pages_per_block]

    def keys_and_values(b: jax.Array) -> tuple[jax.Array, jax.Array]:  # each [seqs, kv_heads, block, head_dim]
        ids = jax.lax.dynamic_slice(table, (0, b * pages_per_block), (seqs, pages_per_block))[:, None]
        # Gathered head by head, so that the tiles land in the order of the matmul and no transpose copies them;
        # without bounds checks, since a block table names pages of the pool.
        tiles = (side.at[layer, ids, heads].get(mode="promise_in_bounds") for side in (pool.k, pool.v))
        keys, values = (tile.reshape(seqs, kv_heads, block, head_dim) for tile in tiles)
        return keys, values

    def accumulate(state: tuple, scores: jax.Array, values: jax.Array) -> tuple:
        total, peak, weight = state
        new_peak = jnp.maximum(peak, scores.max(-1))
        probs = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        update = jnp.einsum("skqc,skcd->skqd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return total * decay[..., None] + update, new_peak, weight * decay + probs.sum(-1)

    def score(keys: jax.Array) -> jax.Array:
        return jnp.einsum("skqd,skcd->skqc", queries, keys, preferred_element_type=jnp.float32)

    def whole_block(b: jax.Array, state: tuple) -> tuple:
        keys, values = keys_and_values(b)
        return accumulate(state, score(keys), values)

    def masked_block(b: jax.Array, state: tuple) -> tuple:
        keys, values = keys_and_values(b)
        slots = b * block + jnp.arange(block, dtype=jnp.int32)
        filled = (slots < lengths[:, None])[:, None, :, None]  # [seqs, 1, block, 1]
        scores = jnp.where(slots <= positions, score(keys), MASKED)
        # An unfilled slot has probability 0, but 0 x NaN is NaN: what lies there must not reach the product.
        return accumulate(state, scores, jnp.where(filled, values, 0))

    state = (
        jnp.zeros((*queries.shape[:-1], head_dim), jnp.float32),
        jnp.full(queries.shape[:-1], MASKED, jnp.float32),
        jnp.zeros(queries.shape[:-1], jnp.float32),
    )
    # Blocks that every sequence sees whole need no mask; empty sequences have no say.
    whole = jnp.min(jnp.where(batch.lengths > 0, batch.prefix, jnp.max(batch.prefix))) // block
    state = jax.lax.fori_loop(0, whole, whole_block, state)
    total, _, weight = jax.lax.fori_loop(whole, (jnp.max(lengths) + block - 1) // block, masked_block, state)
    result = (total / weight[..., None]).astype(q.dtype).reshape(seqs, kv_heads, group, chunk, head_dim)
    return by_token(jnp.einsum("skgqd->sqkgd", result), batch, tokens)


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


def pad_to_multiple(table: Array, multiple: int) -> Array:
    """Widen a block table with page 0 so that its last block is whole; those slots are always masked."""
    short = -table.shape[1] % multiple
    return jnp.pad(table, ((0, 0), (0, short))) if short else table

"""A ragged batch of sequences, and what every attention over it agrees on: no kernel, no arithmetic."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from model.kv import KVPool

# A batch is packed on the host and read on the device.
Array = jax.Array | np.ndarray
# Finite, so that no difference of two of them is NaN.
MASKED = -1e30


@struct.dataclass
class Batch:
    """A ragged batch: the new tokens of several sequences, back to back, each behind its own cached prefix.

    Sequences after the real ones are empty (equal starts), tokens after the last start are padding. Prefill chunks and
    decode tokens can share a batch: the chunks come first.
    """

    tokens: Array  # [tokens] int32
    starts: Array  # [seqs + 1] int32: sequence s owns tokens starts[s]:starts[s + 1]
    prefix: Array  # [seqs] int32: tokens of the sequence that are in the pool already
    block_table: Array  # [seqs, pages] int32: the sequence's pages in order of position
    logit_indices: Array  # [logits] int32: the tokens whose logits are wanted
    max_chunk: int = struct.field(pytree_node=False)  # no sequence has more new tokens than this
    decode_seqs: int = struct.field(pytree_node=False, default=0)  # the last so many have at most one new token

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


def split_prefill_decode(batch: Batch) -> tuple[Batch, Batch]:
    """A batch's sequences of chunks and its sequences of single tokens; both know their tokens in the whole batch."""
    cut = batch.prefix.shape[0] - batch.decode_seqs
    first, last = (
        replace(
            batch,
            starts=batch.starts[part.start : part.stop + 1],
            prefix=batch.prefix[part],
            block_table=batch.block_table[part],
            max_chunk=chunk,
            decode_seqs=0,
        )
        for part, chunk in ((slice(0, cut), batch.max_chunk), (slice(cut, cut + batch.decode_seqs), 1))
    )
    return first, last


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

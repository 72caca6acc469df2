"""A ragged batch of sequences, and what every attention over it agrees on: no kernel, no arithmetic."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32, Int32, Shaped

from model.kv import KVPool

# A batch is packed on the host and read on the device.
Array = jax.Array | np.ndarray
# Finite, so that no difference of two of them is NaN.
MASKED = -1e30
# What a layer without a window has among layers with one: more keys than any sequence has.
NO_WINDOW = 2**31 - 1
# A window counts the keys that a query sees, itself included; None where none of the layers has one.
Window = Int32[jax.Array, ""] | int | None
# Logits that only enter the softmax's denominator, one for each query head.
Sinks = Float32[jax.Array, "kv_heads group"] | None


@struct.dataclass
class Batch:
    """A ragged batch: the new tokens of several sequences, back to back, each after its own cached prefix.

    Sequences after the real ones are empty (equal starts), tokens after the last start are padding. Prefill chunks and
    decode tokens can share a batch: the chunks come first.
    """

    tokens: Int32[Array, "tokens"]
    starts: Int32[Array, "seqs+1"]  # sequence s owns tokens starts[s]:starts[s + 1]
    prefix: Int32[Array, "seqs"]  # tokens of the sequence that are in the pool already
    block_table: Int32[Array, "seqs pages"]  # the sequence's pages in order of position
    logit_indices: Int32[Array, "logits"]  # the tokens whose logits are wanted
    max_chunk: int = struct.field(pytree_node=False)  # no sequence has more new tokens than this
    decode_seqs: int = struct.field(pytree_node=False, default=0)  # the last so many have at most one new token
    # Of a model with recurrent layers, the slot that each sequence goes on from, if it has a prefix (a state of zeros
    # comes before the first token), and the one that its state is written to; an out-of-range slot is not written.
    reads: Int32[Array, "seqs"] | None = None
    writes: Int32[Array, "seqs"] | None = None

    @property
    def lengths(self) -> Int32[Array, "seqs"]:
        """New tokens of each sequence."""
        return self.starts[1:] - self.starts[:-1]


def locate(
    batch: Batch, pool: KVPool
) -> tuple[Int32[jax.Array, "tokens"], Int32[jax.Array, "tokens"], Int32[jax.Array, "tokens"]]:
    """Position, page and offset in the page of every token in the batch; padding gets an out-of-range page."""
    tokens = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    seqs = owners(batch, tokens)
    positions = batch.prefix[seqs] + tokens - batch.starts[seqs]
    pages = batch.block_table[seqs, positions // pool.page_size]
    real = tokens < batch.starts[-1]
    return jnp.where(real, positions, 0), jnp.where(real, pages, pool.num_pages), positions % pool.page_size


def owners(batch: Batch, tokens: Int32[jax.Array, "tokens"]) -> Int32[jax.Array, "tokens"]:
    """The sequence that each token belongs to; padding gets any sequence.

    It compares each token with all starts, in one kernel: a binary search is a loop, of four launches a turn on a GPU.
    """
    found = jnp.searchsorted(batch.starts, tokens, side="right", method="compare_all").astype(jnp.int32)
    return jnp.clip(found - 1, 0, batch.prefix.shape[0] - 1)


def split_prefill_decode(batch: Batch) -> tuple[Batch, Batch]:
    """The prefill sequences and the decode sequences of a batch; both keep their token numbers in the whole batch."""
    cut = batch.prefix.shape[0] - batch.decode_seqs
    prefill, decode = (
        replace(
            batch,
            starts=batch.starts[seqs.start : seqs.stop + 1],
            prefix=batch.prefix[seqs],
            block_table=batch.block_table[seqs],
            max_chunk=chunk,
            decode_seqs=0,
            reads=None if batch.reads is None else batch.reads[seqs],
            writes=None if batch.writes is None else batch.writes[seqs],
        )
        for seqs, chunk in ((slice(0, cut), batch.max_chunk), (slice(cut, cut + batch.decode_seqs), 1))
    )
    return prefill, decode


def by_sequence(x: Shaped[jax.Array, "tokens *rest"], batch: Batch) -> Shaped[jax.Array, "seqs chunk *rest"]:
    """The tokens of each sequence, padded to `max_chunk` with anything: the caller ignores what follows a sequence."""
    seqs, chunk = batch.prefix.shape[0], batch.max_chunk
    if seqs == 1 and chunk == x.shape[0]:
        return x[None]
    return x[jnp.clip(batch.starts[:-1, None] + jnp.arange(chunk), 0, x.shape[0] - 1)]


def by_token(x: Float[jax.Array, "seqs chunk *rest"], batch: Batch, tokens: int) -> Float[jax.Array, "tokens *rest"]:
    """The inverse of `by_sequence` for a batch of `tokens` tokens; padding tokens get anything finite."""
    seqs, chunk = x.shape[:2]
    if seqs == 1 and chunk == tokens:
        return x[0]
    token = jnp.arange(tokens, dtype=jnp.int32)
    seq = owners(batch, token)
    return x[seq, jnp.clip(token - batch.starts[seq], 0, chunk - 1)]

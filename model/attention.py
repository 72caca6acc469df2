"""Attention of new tokens over the paged KV pool: one entry point, which takes the kernel that fits, or XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.batch import Batch, split_prefill_decode
from model.kernels.dispatch import kernel_for
from model.kernels.xla import blockwise
from model.kv import KVPool


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
    if kernel := kernel_for(q, pool, batch):
        return kernel(q, pool, layer, batch)
    if batch.decode_seqs:
        chunks, decodes = split_prefill_decode(batch)
        first, second = (paged_attention(q, k, v, pool, layer, part) for part in (chunks, decodes))
        in_chunk = jnp.arange(q.shape[0]) < chunks.starts[-1]
        return jnp.where(in_chunk[:, None, None, None], first, second)
    return blockwise(q, k, v, pool, layer, batch)

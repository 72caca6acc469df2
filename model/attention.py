"""Attention of new tokens over the paged KV pool: one entry point, which picks a kernel, or XLA where none fits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from model.batch import Batch, Sinks, Window, split_prefill_decode
from model.kernels.dispatch import kernel_for
from model.kernels.xla import blockwise
from model.kv import KVPool


def paged_attention(
    q: Float[jax.Array, "tokens kv_heads group head_dim"],
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    v: Float[jax.Array, "tokens kv_heads head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    window: Window = None,
    sinks: Sinks = None,
) -> Float[jax.Array, "tokens kv_heads group head_dim"]:
    """Causal attention of each new token over its sequence's cached prefix and the new tokens up to itself.

    Query i of a chunk after a prefix of p tokens sees positions 0 to p + i; with a window of w keys, w >= 1, those from
    p + i - w + 1 on, as in transformers' sliding-window masks. Pages before the first one that a query of the sequence
    sees may hold anything. A sink is a logit of its query head that takes a share of the softmax and has no value
    (Agarwal et al., 2025, https://arxiv.org/abs/2508.10925). The new keys and values must be in the pool already.
    Softmax and accumulation are in float32, scores are scaled by head_dim ** -0.5. The pages are those of
    PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180).
    """
    if kernel := kernel_for(q, pool, batch):
        return kernel(q, pool, layer, batch, window, sinks)
    if batch.decode_seqs:
        prefill, decode = split_prefill_decode(batch)
        of_prefill, of_decode = (
            paged_attention(q, k, v, pool, layer, part, window, sinks) for part in (prefill, decode)
        )
        in_prefill = jnp.arange(q.shape[0]) < prefill.starts[-1]
        return jnp.where(in_prefill[:, None, None, None], of_prefill, of_decode)
    return blockwise(q, k, v, pool, layer, batch, window, sinks)

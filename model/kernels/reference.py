"""Attention over the paged pool, written for the reader: what every kernel must compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from model.batch import NO_WINDOW, Batch, Sinks, Window
from model.kv import KVPool
from model.kv_rows import decode


def reference(
    q: Float[jax.Array, "tokens kv_heads group head_dim"],
    pool: KVPool,
    layer: int,
    batch: Batch,
    window: Window = None,
    sinks: Sinks = None,
) -> Float[jax.Array, "tokens kv_heads group head_dim"]:
    """What `paged_attention` must compute: one sequence at a time in float32, as simple as can be."""
    kv_heads, head_dim = q.shape[1], q.shape[3]
    result = jnp.zeros(q.shape, jnp.float32)
    for s in range(batch.prefix.shape[0]):
        start, stop, prefix = int(batch.starts[s]), int(batch.starts[s + 1]), int(batch.prefix[s])
        length = prefix + stop - start
        pages = batch.block_table[s, : -(-length // pool.page_size)]
        k, v = (
            jnp.einsum("bkpd->bpkd", tile).reshape(-1, kv_heads, head_dim)[:length].astype(jnp.float32)
            for tile in (decode(side[layer, pages], jnp.float32) for side in (pool.k, pool.v))
        )
        scores = jnp.einsum("qkgd,ckd->kgqc", q[start:stop].astype(jnp.float32), k) * head_dim**-0.5
        key, query = jnp.arange(length), prefix + jnp.arange(stop - start)[:, None]
        seen = (key <= query) & (key > query - (NO_WINDOW if window is None else window))
        logits = jnp.where(seen, scores, -jnp.inf)
        if sinks is not None:
            sink = jnp.broadcast_to(sinks[:, :, None, None], (*scores.shape[:-1], 1))
            logits = jnp.concatenate([logits, sink], axis=-1)
        probs = jax.nn.softmax(logits, axis=-1)[..., :length]
        result = result.at[start:stop].set(jnp.einsum("kgqc,ckd->qkgd", probs, v))
    return result.astype(q.dtype)

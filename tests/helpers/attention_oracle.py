"""What `paged_attention` must compute, in numpy: independent of JAX, which would compile its every step by itself."""

from __future__ import annotations

import jax
import numpy as np

from model.batch import Batch
from model.kv import KVPool


def attention(
    q: jax.Array,
    pool: KVPool,
    layer: int,
    batch: Batch,
    window: int | None = None,
    sinks: np.ndarray | None = None,  # [kv_heads, group]
) -> np.ndarray:
    """The same arguments and result as `model.kernels.reference.reference`, one sequence at a time in float32."""
    queries, table = np.asarray(q), np.asarray(batch.block_table)
    starts, prefixes = np.asarray(batch.starts).tolist(), np.asarray(batch.prefix).tolist()
    keys, values = (np.asarray(side[layer]) for side in (pool.k, pool.v))  # [pages, kv_heads, page_size, head_dim]
    result = np.zeros(queries.shape, np.float32)
    for s, prefix in enumerate(prefixes):
        start, stop = starts[s : s + 2]
        length = prefix + stop - start
        pages = table[s, : -(-length // keys.shape[2])]
        position = prefix + np.arange(stop - start)[:, None]
        visible = np.arange(length) <= position  # [queries, length]
        if window is not None:
            visible &= np.arange(length) > position - window
        for head in range(queries.shape[1]):
            k, v = (
                side[pages, head].reshape(-1, queries.shape[-1])[:length].astype(np.float32) for side in (keys, values)
            )
            scores = queries[start:stop, head].astype(np.float32) @ k.T * queries.shape[-1] ** -0.5
            scores = np.where(visible[:, None], scores, -np.inf)  # [queries, group, length]
            with np.errstate(invalid="ignore", over="ignore"):
                sink = np.full((queries.shape[2], 1), -np.inf) if sinks is None else np.asarray(sinks)[head][:, None]
                peak = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink)
                weights = np.exp(scores - peak)
                total = weights.sum(-1, keepdims=True) + np.exp(sink - peak)
                result[start:stop, head] = weights / total @ v
    return result.astype(queries.dtype)

"""Attention over the paged pool on CPUs: the call into `paged_attention.cc`, which says how it works.

Sequences may have any number of new tokens each, so prefill and decode are one call. Keys and values are read from the
pool in place, the new ones too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from model.batch import NO_WINDOW, Batch, Sinks, Window
from model.kernels.cpu.build import PAGED_ATTENTION
from model.kv import KVPool
from model.kv_rows import is_quantized

ALIGNMENT = 4  # head_dim and page_size are multiples of it, as of the constant of this name in the kernel


def paged_attention(
    q: Float[jax.Array, "tokens kv_heads group head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    window: Window = None,
    sinks: Sinks = None,
) -> Float32[jax.Array, "tokens kv_heads group head_dim"]:
    """Causal attention of a ragged batch, all in float32; zeros for padding. See `model.attention.paged_attention`.

    A sequence whose new tokens are the same gets the same bits in any batch and with any number of threads. Raises
    ValueError for what `unsupported_reason` names.
    """
    if reason := unsupported_reason(q, pool):
        raise ValueError(reason)
    call = jax.ffi.ffi_call(PAGED_ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
    window = NO_WINDOW if window is None else window
    integers = (jnp.asarray(x, jnp.int32) for x in (layer, batch.starts, batch.prefix, batch.block_table, window))
    return call(q, pool.k, pool.v, *integers, jnp.zeros((q.shape[1], 0)) if sinks is None else sinks)


def unsupported_reason(q: jax.Array, pool: KVPool) -> str | None:
    """Why the kernel cannot compute this, and what it supports; None if it can."""
    if q.dtype != jnp.float32:
        return f"dtype of q is {q.dtype.name}, supported is float32"
    for name, array in (("k", pool.k), ("v", pool.v)):
        if array.dtype != jnp.float32 and not is_quantized(array.dtype):
            return f"dtype of {name} is {array.dtype.name}, supported are float32 and quantised rows"
    for name, found, expected in (
        ("shape of v", pool.v.shape, pool.k.shape),
        ("KV heads of q", q.shape[1], pool.k.shape[2]),
        ("head_dim of q", q.shape[3], pool.head_dim),
    ):
        if found != expected:
            return f"{name} is {found}, the pool's is {expected}"
    if q.shape[-1] % ALIGNMENT:
        return f"head_dim is {q.shape[-1]}, supported are multiples of {ALIGNMENT}"
    if pool.page_size % ALIGNMENT:
        return f"page_size is {pool.page_size}, supported are multiples of {ALIGNMENT}"
    return None

"""Attention over the paged pool on CPUs: the call into `paged_attention.cc`, which says how it works.

Sequences may have any number of new tokens each, so chunks and single tokens need not be told apart. Keys and values
are read from the pool where they lie, the new ones too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.batch import Batch
from model.kernels.cpu.build import PAGED_ATTENTION
from model.kv import KVPool

LEAST = 4  # what the kernel takes multiples of, as its own LEAST says


def paged_attention(
    q: jax.Array,  # [tokens, kv_heads, group, head_dim] float32
    pool: KVPool,  # float32
    layer: jax.Array | int,
    batch: Batch,
) -> jax.Array:
    """Causal attention of a ragged batch, [tokens, kv_heads, group, head_dim]; zeros for padding.

    See `model.attention.paged_attention`. A sequence gets the same bits in any batch and with any number of threads, if
    the same of its tokens are new. Raises ValueError for what the kernel does not take.
    """
    if reason := unsupported_reason(q, pool):
        raise ValueError(reason)
    call = jax.ffi.ffi_call(PAGED_ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
    integers = (jnp.asarray(x, jnp.int32) for x in (layer, batch.starts, batch.prefix, batch.block_table))
    return call(q, pool.k, pool.v, *integers)


def unsupported_reason(q: jax.Array, pool: KVPool) -> str | None:
    """Why the kernel cannot compute this, with what it can; None if it can."""
    for name, array in (("q", q), ("k", pool.k), ("v", pool.v)):
        if array.dtype != jnp.float32:
            return f"dtype of {name} is {array.dtype.name}, supported is float32"
    for name, found, expected in (
        ("shape of v", pool.v.shape, pool.k.shape),
        ("KV heads of q", q.shape[1], pool.k.shape[2]),
        ("head_dim of q", q.shape[3], pool.k.shape[4]),
    ):
        if found != expected:
            return f"{name} is {found}, the pool's is {expected}"
    if q.shape[-1] % LEAST:
        return f"head_dim is {q.shape[-1]}, supported are multiples of {LEAST}"
    if pool.page_size % LEAST:
        return f"page_size is {pool.page_size}, supported are multiples of {LEAST}"
    return None

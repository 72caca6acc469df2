"""Pages copied into the KV pool on CPUs: the call into `pages.cc`, which says how it works."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Shaped

from model.kernels.cpu.build import SCATTER_PAGES
from model.kv import KVPool, Pages


def scatter_pages(
    pool: KVPool,
    pages: Pages,  # int32
    data: Shaped[jax.Array | np.ndarray, "count 2 layers kv_heads page_size row"],
) -> KVPool:
    """As `model.kv.scatter_pages`, in place; its caller donates the pool. Raises ValueError for data of another dtype.

    The tiles of a page are copied as bytes, so any dtype will do.
    """
    layers, _, *tile = pool.k.shape
    expected = (len(pages), 2, layers, *tile)
    if data.shape != expected or data.dtype != pool.k.dtype:
        raise ValueError(f"data is {data.dtype} {data.shape}, expected {pool.k.dtype} {expected}")
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (pool.k, pool.v)]
    call = jax.ffi.ffi_call(SCATTER_PAGES, results, input_output_aliases={0: 0, 1: 1})
    k, v = call(pool.k, pool.v, pages, data)
    return KVPool(k=k, v=v)

"""Compiled copies of pages between the device pool and arrays of their own, a few fixed counts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from model.kv import KVPool, gather_pages, scatter_pages
from serve.engine.programs import Programs

# Pages that one compiled copy moves; the largest is also the unit of a restore.
BATCHES = (16, 4, 1)
# Bytes: an array that is aligned like this is used by XLA on a CPU without a copy.
ALIGNMENT = 64


@dataclass(frozen=True)
class PageCopies:
    """Programs by count of pages: `gather[n](pool, pages)` and `scatter[n](pool, pages, data)`.

    `pages` is [n] int32, `data` is [n, *page_shape]. A scatter donates the pool: use the one that it returns.
    """

    gather: Mapping[int, Callable[..., jax.Array]]
    scatter: Mapping[int, Callable[..., KVPool]]
    page_shape: tuple[int, ...]  # k and v, layers, kv_heads, page_size, head_dim
    dtype: np.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize


def make_page_copies(programs: Programs, pool: KVPool, rank: int) -> PageCopies:
    """Declare the copies for a pool of this shape; nothing is compiled yet."""
    layers, _, *tile = pool.k.shape
    shape = (2, layers, *tile)
    gather, scatter = {}, {}
    for count in BATCHES:
        pages = jax.ShapeDtypeStruct((count,), jnp.int32)
        data = jax.ShapeDtypeStruct((count, *shape), pool.k.dtype)
        gather[count] = programs.add(rank, f"gather of {count} pages", gather_pages, (pool, pages), 0)
        scatter[count] = programs.add(
            rank, f"scatter of {count} pages", scatter_pages, (pool, pages, data), pool, donate=(0,)
        )
    return PageCopies(gather, scatter, shape, np.dtype(pool.k.dtype))


def batch_sizes(count: int) -> list[int]:
    """`count` pages as a sum of compiled counts, the largest first."""
    sizes = []
    for size in BATCHES:
        sizes += [size] * (count // size)
        count %= size
    return sizes


def staging_buffer(count: int, page_bytes: int) -> np.ndarray:
    """An aligned buffer to read pages into, [count, page_bytes] uint8, uninitialised."""
    buffer = np.empty(count * page_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count * page_bytes].reshape(count, page_bytes)

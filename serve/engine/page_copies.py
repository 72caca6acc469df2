"""Compiled copies of pages between the device pool and arrays of their own, a few fixed counts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels.cpu import build
from model.kernels.cpu import pages as cpu_pages
from model.kernels.dispatch import on_cpu
from model.kv import KVPool, gather_pages, scatter_pages
from serve.engine.programs import Programs

# Pages that one compiled copy moves.
BATCHES = (16, 4, 1)
# A restore copies so many pages at once, where they are small; every copy costs a turn of the engine.
MANY, MANY_BYTES = 64, 8 << 20


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
    def slice_pages(self) -> int:
        """Pages that the largest scatter copies."""
        return max(self.scatter)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize


def make_page_copies(programs: Programs, pool: KVPool, rank: int) -> PageCopies:
    """Declare the copies for a pool of this shape; nothing is compiled yet."""
    layers, _, *tile = pool.k.shape
    shape, dtype = (2, layers, *tile), np.dtype(pool.k.dtype)
    in_place = cpu_pages.scatter_pages if on_cpu() and build.available() else scatter_pages
    few = int(np.prod(shape)) * dtype.itemsize * MANY > MANY_BYTES
    gather, scatter = {}, {}
    for count in BATCHES if few else (MANY, *BATCHES):
        pages = jax.ShapeDtypeStruct((count,), jnp.int32)
        data = jax.ShapeDtypeStruct((count, *shape), dtype)
        scatter[count] = programs.add(
            rank, f"scatter of {count} pages", in_place, (pool, pages, data), pool, donate=(0,)
        )
        if count in BATCHES:
            gather[count] = programs.add(rank, f"gather of {count} pages", gather_pages, (pool, pages), 0)
    return PageCopies(gather, scatter, shape, dtype)


def batch_sizes(count: int, sizes: Iterable[int] = BATCHES) -> list[int]:
    """`count` pages as a sum of compiled counts, the largest first; `sizes` has 1 and is in falling order."""
    chosen = []
    for size in sizes:
        chosen += [size] * (count // size)
        count %= size
    return chosen

"""Compiled copies of pages between the device pool and arrays of their own, a few fixed counts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.kernels.cpu import build
from model.kernels.cpu import pages as cpu_pages
from model.kernels.dispatch import on_cpu
from model.kv import KVPool, Pages, gather_pages, scatter_pages
from model.sharding import partition_specs
from serve.engine.programs import Programs

# Pages that one compiled copy moves.
BATCHES = (16, 4, 1)
# A restore copies so many pages at once, where they are small; every copy costs a turn of the engine.
MANY, MANY_BYTES = 64, 8 << 20


@dataclass(frozen=True)
class PageCopies:
    """Programs by count of pages: `gather[n](pool, pages)` and `scatter[n](pool, pages, data)`.

    `pages` is [n] int32, `data` is [n, *page_shape], which lies on several devices as the pool does: each has its KV
    heads. A scatter donates the pool: use the one that it returns.
    """

    gather: Mapping[int, Callable[..., jax.Array]]
    scatter: Mapping[int, Callable[..., KVPool]]
    page_shape: tuple[int, ...]  # k and v, layers, kv_heads, page_size, row
    dtype: np.dtype
    sharding: NamedSharding | None  # of data; None on a single device

    @property
    def slice_pages(self) -> int:
        """Pages that the largest scatter copies."""
        return max(self.scatter)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize


def pages_sharding(pool: KVPool, mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of pages, [count, k and v, layers, kv_heads, page_size, row], by KV heads as in the pool."""
    # [layers, pages, kv_heads, page_size, row]
    return NamedSharding(mesh, PartitionSpec(None, *partition_specs(pool, mesh).k)) if mesh else None


def scatter_by_device(pool: KVPool, pages: Pages, data: jax.Array, mesh: Mesh) -> KVPool:
    """`cpu_pages.scatter_pages` on each device of a mesh, of its own KV heads."""
    sides, place = partition_specs(pool, mesh), pages_sharding(pool, mesh)
    assert place is not None
    given = (sides, PartitionSpec(), place.spec)
    scatter = jax.shard_map(cpu_pages.scatter_pages, mesh=mesh, in_specs=given, out_specs=sides, check_vma=False)
    scattered: KVPool = scatter(pool, pages, data)
    return scattered


def make_page_copies(programs: Programs, pool: KVPool, rank: int) -> PageCopies:
    """Declare the copies for a pool of this shape; nothing is compiled yet."""
    layers, _, *tile = pool.k.shape
    shape, dtype, sharding = (2, layers, *tile), np.dtype(pool.k.dtype), pages_sharding(pool, programs.mesh)
    write: tuple[Callable[..., KVPool], dict[str, Any]] = scatter_pages, {}
    if on_cpu() and build.available():
        mesh = programs.mesh
        write = (scatter_by_device, {"mesh": mesh}) if mesh else (cpu_pages.scatter_pages, {})
    few = int(np.prod(shape)) * dtype.itemsize * MANY > MANY_BYTES
    gather, scatter = {}, {}
    for count in BATCHES if few else (MANY, *BATCHES):
        pages = jax.ShapeDtypeStruct((count,), jnp.int32)
        data = jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)
        scatter[count] = programs.add(
            rank, f"scatter of {count} pages", write[0], (pool, pages, data), pool, (0,), write[1]
        )
        if count in BATCHES:
            gather[count] = programs.add(rank, f"gather of {count} pages", gather_pages, (pool, pages), data)
    return PageCopies(gather, scatter, shape, dtype, sharding)


def batch_sizes(count: int, sizes: Iterable[int] = BATCHES) -> list[int]:
    """`count` pages as a sum of compiled counts, the largest first; `sizes` has 1 and is in falling order."""
    chosen = []
    for size in sizes:
        chosen += [size] * (count // size)
        count %= size
    return chosen

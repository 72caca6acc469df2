"""The ring of shared-memory stages through which the memory warpgroup feeds pages to the compute warpgroups.

A stage holds a block of consecutive keys and their values. The values have barriers of their own, so that scores can
start before the values have arrived. Blocks are made of whole pages, each one TMA box of [page_size, head_dim].
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.hopper import compat

# Tiles of 8 rows and 64 bf16 columns under a 128-byte swizzle: the layout that wgmma reads, transposed or not.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class Ring(NamedTuple):
    """Refs of the stages and their barriers, or the types to allocate them by."""

    k: Any  # [stages, block, head_dim]
    v: Any  # [stages, block, head_dim]
    k_full: Any  # [stages] barriers
    v_full: Any
    k_free: Any
    v_free: Any


def ring_types(stages: int, block: int, head_dim: int, page_size: int, readers: int) -> Ring:
    """The types to allocate for a ring whose stages are each read by `readers` warpgroups.

    Raises ValueError if a block is not made of whole pages.
    """
    if block % page_size:
        raise ValueError(f"a block has {block} keys, expected a multiple of the page's {page_size}")
    stage = plgpu.SMEM((stages, block, head_dim), jnp.bfloat16, transforms=TILED)
    full = plgpu.Barrier(num_arrivals=block // page_size, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return Ring(stage, stage, full, full, free, free)


def blocks_of_split(
    oldest: jax.Array | int, keys: jax.Array, block: int, split: jax.Array, splits: int
) -> tuple[jax.Array, jax.Array]:
    """The blocks `start` to `stop` of one split of the keys from `oldest` to `keys`; the last splits may have none."""
    first = lax.div(jnp.int32(oldest), jnp.int32(block))
    blocks = lax.div(keys + (block - 1), jnp.int32(block))
    share = lax.div(blocks - first + (splits - 1), jnp.int32(splits))
    start = jnp.minimum(first + split * share, blocks)
    return start, jnp.minimum(start + share, blocks)


def fill(
    ring: Ring,
    k: Any,  # [layers, pages, kv_heads, page_size, head_dim] in device memory
    v: Any,
    table: Any,  # [seqs, pages] int32 in device memory
    seq: jax.Array,
    layer: jax.Array,
    kv_head: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    oldest: jax.Array | int,
    keys: jax.Array,
) -> None:
    """The memory warpgroup's work: load blocks `start` to `stop` of a sequence, of which keys `oldest` to `keys` count.

    Where a block reaches beyond the pages of these keys, the first or last of them is loaded again, since what other
    entries of the table name may hold anything.
    """
    stages, block, _ = ring.k.shape
    page_size = k.shape[3]
    first_page = lax.div(jnp.int32(oldest), jnp.int32(page_size))
    last_page = lax.div(jnp.maximum(keys - 1, 0), jnp.int32(page_size))
    stage_of = partial(lax.rem, y=jnp.int32(stages))

    @pl.loop(start, stop)
    def load(i: jax.Array) -> None:
        stage = stage_of(i - start)
        first = i * (block // page_size)
        # Read before the wait, which hides the latency of the table.
        pages = [table[seq, jnp.clip(first + p, first_page, last_page)] for p in range(block // page_size)]
        sides = ((k, ring.k, ring.k_full, ring.k_free), (v, ring.v, ring.v_full, ring.v_free))
        for side, buffer, full, free in sides:

            @pl.when(i - start >= stages)
            def wait_until_free(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[stage])

            for p, page in enumerate(pages):
                keys_of_page = pl.ds(p * page_size, page_size)
                plgpu.copy_gmem_to_smem(side.at[layer, page, kv_head], buffer.at[stage, keys_of_page], full.at[stage])

    # A thread block may not end before every warpgroup has arrived at its barriers.
    @pl.loop(jnp.maximum(stop - stages, start), stop)
    def drain(i: jax.Array) -> None:
        plgpu.barrier_wait(ring.k_free.at[stage_of(i - start)])
        plgpu.barrier_wait(ring.v_free.at[stage_of(i - start)])


def zero_unseen(values: Any, first: jax.Array, keys: jax.Array) -> None:
    """Zero a stage's values from position `keys` on; `first` is the position of its first value.

    What was never written may be NaN, and a probability of 0 times NaN is NaN.
    """

    @pl.loop(0, values.shape[0] // 64)
    def zero_tile(i: jax.Array) -> None:
        tile = values.at[pl.ds(i * 64, 64)]
        kept = compat.load(tile, plgpu.Layout.WGMMA)
        positions = plgpu.broadcasted_iota(jnp.int32, kept.shape, 0, layout=plgpu.Layout.WGMMA) + (first + i * 64)
        tile[...] = jnp.where(positions < keys, kept, jnp.zeros_like(kept))

    plgpu.commit_smem()

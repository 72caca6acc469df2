"""The ring of shared-memory stages through which one memory warpgroup feeds pages to the compute warpgroups.

A stage holds a block of consecutive keys and, behind barriers of its own, their values, so that scores can start before
the values are there. Blocks are made of whole pages, each one TMA box of [page_size, head_dim].
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

# Rows of eight and 64 bf16 columns under a 128-byte swizzle: the form in which wgmma reads operands of either order.
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
    """What to allocate for a ring whose stages are each read by `readers` warpgroups.

    Raises ValueError where a block is not made of whole pages.
    """
    if block % page_size:
        raise ValueError(f"a block has {block} keys, expected a multiple of the page's {page_size}")
    stage = plgpu.SMEM((stages, block, head_dim), jnp.bfloat16, transforms=TILED)
    full = plgpu.Barrier(num_arrivals=block // page_size, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return Ring(stage, stage, full, full, free, free)


def share_of_keys(keys: jax.Array, block: int, part: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """The blocks `start` to `stop` that are one part's of `keys` keys; the last parts may have none."""
    blocks = lax.div(keys + (block - 1), jnp.int32(block))
    share = lax.div(blocks + (parts - 1), jnp.int32(parts))
    start = jnp.minimum(part * share, blocks)
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
    keys: jax.Array,
) -> None:
    """The memory warpgroup's work: load blocks `start` to `stop` of a sequence that has `keys` keys.

    Where the last block reaches beyond the last page, that page is loaded again: entries of the table behind it are
    nobody's business.
    """
    stages, block, _ = ring.k.shape
    page_size = k.shape[3]
    last_page = lax.div(jnp.maximum(keys - 1, 0), jnp.int32(page_size))
    slot_of = partial(lax.rem, y=jnp.int32(stages))

    @pl.loop(start, stop)
    def load(i: jax.Array) -> None:
        slot = slot_of(i - start)
        first = i * (block // page_size)
        # Read before the wait, so that the table's latency hides behind it.
        pages = [table[seq, jnp.minimum(first + p, last_page)] for p in range(block // page_size)]
        sides = ((k, ring.k, ring.k_full, ring.k_free), (v, ring.v, ring.v_full, ring.v_free))
        for side, stage, full, free in sides:

            @pl.when(i - start >= stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            for p, page in enumerate(pages):
                rows = pl.ds(p * page_size, page_size)
                plgpu.copy_gmem_to_smem(side.at[layer, page, kv_head], stage.at[slot, rows], full.at[slot])

    # No block may end while another warpgroup has yet to arrive at its barriers.
    @pl.loop(jnp.maximum(stop - stages, start), stop)
    def drain(i: jax.Array) -> None:
        plgpu.barrier_wait(ring.k_free.at[slot_of(i - start)])
        plgpu.barrier_wait(ring.v_free.at[slot_of(i - start)])


def zero_unseen(values: Any, first: jax.Array, keys: jax.Array) -> None:
    """Zero a stage's values from slot `keys` on; `first` is the slot of its first row.

    What was never written may be NaN, and a probability of 0 times NaN is NaN.
    """

    @pl.loop(0, values.shape[0] // 64)
    def _(i: jax.Array) -> None:
        rows = values.at[pl.ds(i * 64, 64)]
        kept = compat.load(rows, plgpu.Layout.WGMMA)
        slots = plgpu.broadcasted_iota(jnp.int32, kept.shape, 0, layout=plgpu.Layout.WGMMA) + (first + i * 64)
        rows[...] = jnp.where(slots < keys, kept, jnp.zeros_like(kept))

    plgpu.commit_smem()
